// Attention of a whole training batch, forward and backward, on the cores of a CPU.
//
// PyTorch's operations write queries, keys, scores and their gradients to memory and read them again, a dozen times. Here
// one head of one sequence is done from its norms and rotations to its last gradient while it lies in the core's cache, and
// causal scores above the diagonal are left out. Products take fp32 or, with a CPU that multiplies it (AVX512-BF16), bf16,
// and sum in fp32; all else is fp32. Threads share out sequences and heads; for one number of threads the bits are always
// the same.
//
// Compiled by compiled.py with -march=native; called through ctypes by native_attention.py.

#include <omp.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

extern "C" {

// All contiguous. qkv and its gradient (batch, length, 3, heads, head_dim), mixed and its gradient (batch, length, heads,
// head_dim), all bf16 if is_brief, else float. Weights of the norms of queries and keys (head_dim), and their gradients.
// cosines, sines (length, head_dim / 2), or null. log_sums (batch, heads, length): of each query's exponentials.
// head_dim: 32, 64, 96 or 128.
struct Attention {
    const void* qkv;
    const float *query_weight, *key_weight, *cosines, *sines;
    void* mixed;
    float* log_sums;
    const void* mixed_gradient;
    void* qkv_gradient;
    float *query_weight_gradient, *key_weight_gradient;
    int64_t batch, length, heads, head_dim, is_causal, is_brief, threads;
};
}

namespace {

// MOST_ROWS and MOST_VECTORS of a product's tile: its sums and what they need fill the registers, 32 or 16.
#ifdef __AVX512F__
constexpr int LANES = 16;  // numbers in a vector
constexpr int MOST_ROWS = 6, MOST_VECTORS = 4;
#else
constexpr int LANES = 8;
constexpr int MOST_ROWS = 6, MOST_VECTORS = 2;
#endif
constexpr int AHEAD = 16;  // rows by which reading one is announced
constexpr float EPSILON = 1e-6f;

typedef float Vec __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES), may_alias));
typedef float LooseVec __attribute__((vector_size(4 * LANES), may_alias, aligned(4)));

#ifdef __AVX512F__
constexpr IntVec PLACES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#else
constexpr IntVec PLACES = {0, 1, 2, 3, 4, 5, 6, 7};
#endif

inline int64_t rounded_up(int64_t number, int64_t step) { return (number + step - 1) / step * step; }

inline Vec load(const float* from) { return *reinterpret_cast<const LooseVec*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<LooseVec*>(to) = value; }

inline Vec all(float value) { return value - Vec{}; }

// The vector with the lanes of each pair that stand so far apart, a power of 2, swapped.
inline Vec swapped(Vec v, int apart) { return __builtin_shuffle(v, PLACES ^ apart); }

inline float sum(Vec v) {
    for (int apart = LANES / 2; apart; apart /= 2) v += swapped(v, apart);
    return v[0];
}

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline float maximum(Vec v) {
    for (int apart = LANES / 2; apart; apart /= 2) v = larger(v, swapped(v, apart));
    return v[0];
}

// Numbers that begin where a cache line does, at first all zero, so that no vector lies across two lines.
template <typename T>
struct AlignedAllocator {
    using value_type = T;
    AlignedAllocator() = default;
    template <typename U>
    AlignedAllocator(const AlignedAllocator<U>&) {}
    T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64})); }
    void deallocate(T* numbers, size_t) { ::operator delete(numbers, std::align_val_t{64}); }
    bool operator==(const AlignedAllocator&) const { return true; }
    bool operator!=(const AlignedAllocator&) const { return false; }
};
template <typename T>
using Numbers = std::vector<T, AlignedAllocator<T>>;

// Lane c of vector r becomes lane r of vector c.
inline void transpose(Vec (&rows)[LANES]) {
    for (int apart = 1; apart < LANES; apart *= 2) {
        const IntVec of_first = (PLACES & apart) == 0 ? PLACES : PLACES + LANES - apart, of_second = of_first + apart;
        for (int r = 0; r < LANES; ++r) {
            if (r & apart) continue;
            const Vec first = rows[r], second = rows[r + apart];
            rows[r] = __builtin_shuffle(first, second, of_first);
            rows[r + apart] = __builtin_shuffle(first, second, of_second);
        }
    }
}

// e^x to about 1e-7 of its size, for x below 88; 0 for what is below -87.
inline Vec exponential(Vec x) {
    const Vec least = all(-87.0f), shift = all(12582912.0f);  // 1.5 × 2^23: adding it rounds to whole numbers
    const Vec shifted = larger(x, least) * 1.44269504f + shift, whole = shifted - shift;
    const Vec rest = (larger(x, least) - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Vec power = all(1.3888889e-3f);
    for (float coefficient : {8.3333333e-3f, 4.1666667e-2f, 0.16666667f, 0.5f, 1.0f, 1.0f}) power = power * rest + coefficient;
    const IntVec exponent = (reinterpret_cast<const IntVec&>(shifted) - reinterpret_cast<const IntVec&>(shift)) << 23;
    const IntVec scaled = reinterpret_cast<const IntVec&>(power) + exponent;
    return x < least ? Vec{} : reinterpret_cast<const Vec&>(scaled);
}

// What is particular to fp32: each lane multiplies one number of a row by one of a column.
struct Single {
    using Number = float;  // of qkv, mixed and their gradients
    using Factor = float;  // what a lane multiplies at once, SIZE numbers of a row or a column
    using Factors = Vec;
    static constexpr int SIZE = 1;

    static Factors load_factors(const Factor* from) { return load(from); }

    static Vec add_product(Vec sum, Factor row, Factors columns) { return sum + row * columns; }

    // to[c] = the factor of the numbers c of SIZE rows, of which there is only the first here.
    static void join(const Number* first, const Number*, Factor* to, int64_t size) { std::memcpy(to, first, size * sizeof(Factor)); }
};

#ifdef __AVX512BF16__
inline Vec load(const uint16_t* from) {
    const __m256i brief = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(brief), 16));
}

inline void store(uint16_t* to, Vec value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
}

// The same for bf16: one instruction multiplies and sums two pairs, whose first numbers are in the lower halves.
struct Brief {
    using Number = uint16_t;
    using Factor = uint32_t;
    using Factors = __m512bh;
    static constexpr int SIZE = 2;

    static Factors load_factors(const Factor* from) { return reinterpret_cast<Factors>(_mm512_loadu_si512(from)); }

    static Vec add_product(Vec sum, Factor row, Factors columns) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<Factors>(_mm512_set1_epi32(static_cast<int32_t>(row))), columns);
    }

    static void join(const Number* first, const Number* second, Factor* to, int64_t size) {
        for (int64_t c = 0; c < size; c += LANES) {
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + c)));
            const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second + c)));
            _mm512_storeu_si512(to + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
};
#endif

// out[r][c] = sum over p of factor (r, p) of a times factor (p, c) of b, for ROWS rows and VECTORS vectors of columns.
// Factor (r, p) of a stands at a[r * a_row + p * a_step], factor (p, c) of b at b[p * b_step + c].
template <class T, int ROWS, int VECTORS>
void multiply_tile(const typename T::Factor* a, int64_t a_row, int64_t a_step, const typename T::Factor* b, int64_t b_step, int64_t depth, float* out,
                   int64_t out_row) {
    Vec sums[ROWS][VECTORS];
    for (auto& row : sums)
        for (Vec& total : row) total = Vec{};
    for (int64_t p = 0; p < depth; ++p) {
        typename T::Factors columns[VECTORS];
        for (int v = 0; v < VECTORS; ++v) columns[v] = T::load_factors(b + p * b_step + v * LANES);
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = T::add_product(sums[r][v], a[r * a_row + p * a_step], columns[v]);
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) store(out + r * out_row + v * LANES, sums[r][v]);
}

template <class T, size_t... I>
constexpr auto tiles(std::index_sequence<I...>) {
    return std::array{&multiply_tile<T, I / MOST_VECTORS + 1, I % MOST_VECTORS + 1>...};
}
template <class T>
constexpr auto TILES = tiles<T>(std::make_index_sequence<MOST_ROWS * MOST_VECTORS>());

// As multiply_tile, for any number of rows and of columns that is a multiple of LANES.
template <class T>
void multiply(const typename T::Factor* a, int64_t a_row, int64_t a_step, const typename T::Factor* b, int64_t b_step, int64_t depth, int64_t rows,
              int64_t columns, float* out, int64_t out_row) {
    for (int64_t c = 0; c < columns; c += MOST_VECTORS * LANES) {
        const int64_t vectors = std::min<int64_t>(MOST_VECTORS, (columns - c) / LANES);
        for (int64_t r = 0; r < rows; r += MOST_ROWS) {
            const int64_t height = std::min<int64_t>(MOST_ROWS, rows - r);
            const auto tile = TILES<T>[(height - 1) * MOST_VECTORS + vectors - 1];
            tile(a + r * a_row, a_row, a_step, b + c, b_step, depth, out + r * out_row + c, out_row);
        }
    }
}

// How the rows of a head are normed and turned, and the way back for gradients.
template <class T, int DIM>
struct Turn {
    using Number = typename T::Number;

    const float *weight, *cosines, *sines;  // cosines and sines null where nothing turns
    float scale;  // of what comes out

    // Centred and scaled to a variance of 1: row (dim) to normed; returns the scale.
    float normalize(const Number* row, float* normed) const {
        Vec total{}, squares{};
        for (int64_t d = 0; d < DIM; d += LANES) total += load(row + d);
        const float mean = sum(total) / DIM;
        for (int64_t d = 0; d < DIM; d += LANES) {
            const Vec centred = load(row + d) - mean;
            squares += centred * centred;
            store(normed + d, centred);
        }
        const float factor = 1 / std::sqrt(sum(squares) / DIM + EPSILON);
        for (int64_t d = 0; d < DIM; d += LANES) store(normed + d, load(normed + d) * factor);
        return factor;
    }

    // The row (dim) at a place of the sequence, as scores take it.
    void apply(const Number* row, int64_t place, Number* to) const {
        alignas(64) float normed[DIM];
        normalize(row, normed);
        const int64_t half = DIM / 2;
        for (int64_t d = 0; d < half; d += LANES) {
            const Vec a = load(normed + d) * (load(weight + d) * scale);
            const Vec b = load(normed + half + d) * (load(weight + half + d) * scale);
            const Vec cosine = cosines ? load(cosines + place * half + d) : all(1), sine = cosines ? load(sines + place * half + d) : all(0);
            store(to + d, a * cosine - b * sine);
            store(to + half + d, b * cosine + a * sine);
        }
    }

    // From the gradient (dim) of what `apply` has made of a row, which it overwrites, the row's own; adds the weight's.
    void apply_backward(const Number* row, int64_t place, float* gradient, Number* to, float* weight_gradient) const {
        alignas(64) float normed[DIM];
        const float factor = normalize(row, normed);
        const int64_t half = DIM / 2;
        for (int64_t d = 0; d < half; d += LANES) {
            const Vec a = load(gradient + d) * scale, b = load(gradient + half + d) * scale;
            const Vec cosine = cosines ? load(cosines + place * half + d) : all(1), sine = cosines ? load(sines + place * half + d) : all(0);
            store(gradient + d, a * cosine + b * sine);
            store(gradient + half + d, b * cosine - a * sine);
        }
        Vec total{}, along{};
        for (int64_t d = 0; d < DIM; d += LANES) {
            const Vec turned_back = load(gradient + d), own = load(normed + d);
            store(weight_gradient + d, load(weight_gradient + d) + turned_back * own);
            const Vec weighted = turned_back * load(weight + d);
            total += weighted;
            along += weighted * own;
            store(gradient + d, weighted);
        }
        const float mean = sum(total) / DIM, share = sum(along) / DIM;
        for (int64_t d = 0; d < DIM; d += LANES) {
            const Vec rest = load(gradient + d) - (load(normed + d) * share + mean);
            store(to + d, rest * factor);
        }
    }
};

// One head of one sequence, and the scratch of the thread that works on it. `room`: length, rounded up to whole vectors;
// what lies beyond the length is zero.
template <class T, int DIM>
class Head {
    using Number = typename T::Number;
    using Factor = typename T::Factor;
    static constexpr int SIZE = T::SIZE, DEPTH = DIM / SIZE;  // numbers in a factor, factors in a row

public:
    explicit Head(const Attention& task)
        : t(task),
          length(task.length),
          room(rounded_up(task.length, LANES)),
          query_turn{task.query_weight, task.cosines, task.sines, 1 / std::sqrt(static_cast<float>(DIM))},
          key_turn{task.key_weight, task.cosines, task.sines, 1},
          queries(room * DIM),
          keys(room * DIM),
          scores(MOST_ROWS * room),
          shares(MOST_ROWS * room),
          sums(MOST_ROWS * DIM),
          key_columns(DEPTH * room),
          value_rows(room / SIZE * DIM) {}

    void forward(int64_t sequence, int64_t head) {
        turn(query_turn, projected(sequence, head, QUERIES), queries);
        turn(key_turn, projected(sequence, head, KEYS), keys);
        read_columns(keys.data(), DIM, key_columns);
        read_rows(projected(sequence, head, VALUES), qkv_step(), value_rows);
        float* log_sums = t.log_sums + (sequence * t.heads + head) * length;
        Number* mixed = static_cast<Number*>(t.mixed) + (sequence * length * t.heads + head) * DIM;
        for (int64_t first = 0; first < length; first += MOST_ROWS) {
            const int64_t rows = std::min<int64_t>(MOST_ROWS, length - first), columns = seen(first + rows - 1, LANES);
            score(first, rows, columns);
            float scales[MOST_ROWS];
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t end = seen(first + r, 1);
                float* own = &scores[r * room];
                std::fill(own + end, own + columns, -INFINITY);
                Vec best = all(-INFINITY), totals{};
                for (int64_t c = 0; c < columns; c += LANES) best = larger(best, load(own + c));
                const float most = maximum(best);
                for (int64_t c = 0; c < columns; c += LANES) {
                    const Vec share = exponential(load(own + c) - most);
                    totals += share;
                    store(&shares[r * room + c], share);
                }
                const float total = sum(totals);
                scales[r] = 1 / total;
                log_sums[first + r] = most + std::log(total);
            }
            multiply<T>(factors(shares), room / SIZE, 1, value_rows.data(), DIM, columns / SIZE, rows, DIM, sums.data(), DIM);
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t d = 0; d < DIM; d += LANES) store(mixed + (first + r) * t.heads * DIM + d, load(&sums[r * DIM + d]) * scales[r]);
        }
    }

    // weight_gradient (2, dim): those of the queries' and the keys' norms, which it adds to.
    void backward(int64_t sequence, int64_t head, float* weight_gradient) {
        make_room_for_gradients();
        turn(query_turn, projected(sequence, head, QUERIES), queries);
        turn(key_turn, projected(sequence, head, KEYS), keys);
        read_columns(keys.data(), DIM, key_columns);
        read_columns(projected(sequence, head, VALUES), qkv_step(), value_columns);
        const Number* gradient = static_cast<const Number*>(t.mixed_gradient) + (sequence * length * t.heads + head) * DIM;
        read_rows(gradient, t.heads * DIM, gradient_rows);
        read_rows(queries.data(), DIM, query_rows);
        read_rows(keys.data(), DIM, key_rows);
        const float* log_sums = t.log_sums + (sequence * t.heads + head) * length;
        for (int64_t first = 0; first < length; first += MOST_ROWS) {
            const int64_t rows = std::min<int64_t>(MOST_ROWS, length - first), columns = seen(first + rows - 1, LANES);
            score(first, rows, columns);
            const auto* own_gradient = reinterpret_cast<const Factor*>(gradient + first * t.heads * DIM);
            multiply<T>(own_gradient, t.heads * DEPTH, 1, value_columns.data(), room, DEPTH, rows, columns, share_gradients.data(), room);
            for (int64_t r = 0; r < rows; ++r) spread(first + r, r, columns, log_sums[first + r]);
            for (int64_t r = rows; r < rounded_up(rows, SIZE); ++r) {  // the pair of a last odd row
                std::fill_n(&shares[r * room], room, 0);
                std::fill_n(&score_gradients[r * room], room, 0);
            }
            for (int64_t r = 0; r < rows; r += SIZE) {
                const int64_t second = r + SIZE - 1, at = (first + r) / SIZE * room;
                T::join(&shares[r * room], &shares[second * room], &share_rows[at], room);
                T::join(&score_gradients[r * room], &score_gradients[second * room], &score_rows[at], room);
            }
            multiply<T>(factors(score_gradients), room / SIZE, 1, key_rows.data(), DIM, columns / SIZE, rows, DIM, sums.data(), DIM);
            for (int64_t r = 0; r < rows; ++r) turn_back(query_turn, sequence, head, QUERIES, first + r, &sums[r * DIM], weight_gradient);
        }
        const int64_t query_factors = rounded_up(length, SIZE) / SIZE;
        for (int64_t first = 0; first < length; first += MOST_ROWS) {
            const int64_t rows = std::min<int64_t>(MOST_ROWS, length - first), start = t.is_causal ? first / SIZE : 0, count = query_factors - start;
            multiply<T>(&score_rows[start * room + first], 1, room, &query_rows[start * DIM], DIM, count, rows, DIM, sums.data(), DIM);
            for (int64_t r = 0; r < rows; ++r) turn_back(key_turn, sequence, head, KEYS, first + r, &sums[r * DIM], weight_gradient + DIM);
            multiply<T>(&share_rows[start * room + first], 1, room, &gradient_rows[start * DIM], DIM, count, rows, DIM, sums.data(), DIM);
            Number* to = projected_gradient(sequence, head, VALUES) + first * qkv_step();
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t d = 0; d < DIM; d += LANES) store(to + r * qkv_step() + d, load(&sums[r * DIM + d]));
        }
    }

private:
    enum Part { QUERIES, KEYS, VALUES };

    // Where a part of a head begins in qkv, and from one of its rows to the next.
    int64_t place(int64_t sequence, int64_t head, Part part) const { return ((sequence * length * 3 + part) * t.heads + head) * DIM; }
    int64_t qkv_step() const { return 3 * t.heads * DIM; }

    const Number* projected(int64_t sequence, int64_t head, Part part) const { return static_cast<const Number*>(t.qkv) + place(sequence, head, part); }
    Number* projected_gradient(int64_t sequence, int64_t head, Part part) const { return static_cast<Number*>(t.qkv_gradient) + place(sequence, head, part); }

    // Asks for the row that is read soon after row i, of those that stand `step` numbers apart.
    void announce(const Number* from, int64_t i, int64_t step) const {
        const Number* later = from + std::min<int64_t>(i + AHEAD, length - 1) * step;
        for (int64_t d = 0; d < DIM; d += 64 / sizeof(Number)) __builtin_prefetch(later + d);
    }

    static const Factor* factors(const Numbers<Number>& numbers) { return reinterpret_cast<const Factor*>(numbers.data()); }

    // How many keys the query at a place sees, rounded up.
    int64_t seen(int64_t place, int64_t step) const { return rounded_up(t.is_causal ? place + 1 : length, step); }

    // Not inlined, so that forward and backward round alike.
    __attribute__((noinline)) void turn(const Turn<T, DIM>& turn, const Number* from, Numbers<Number>& to) const {
        for (int64_t i = 0; i < length; ++i) {
            announce(from, i, qkv_step());
            turn.apply(from + i * qkv_step(), i, &to[i * DIM]);
        }
    }

    // Rows (dim) that stand `step` numbers apart, as columns of factors (DEPTH, room).
    void read_columns(const Number* from, int64_t step, Numbers<Factor>& columns) const {
        for (int64_t j = 0; j < length; j += LANES) {
            for (int64_t r = 0; r < LANES; ++r) announce(from, j + r, step);
            for (int64_t p = 0; p < DEPTH; p += LANES) {
                Vec square[LANES];
                for (int64_t r = 0; r < LANES; ++r)
                    square[r] = j + r < length ? load(reinterpret_cast<const float*>(from + (j + r) * step + p * SIZE)) : Vec{};
                transpose(square);
                for (int64_t c = 0; c < LANES; ++c) store(reinterpret_cast<float*>(&columns[(p + c) * room + j]), square[c]);
            }
        }
    }

    // The same rows, SIZE after each other as a row of factors (room / SIZE, dim).
    void read_rows(const Number* from, int64_t step, Numbers<Factor>& rows) const {
        alignas(64) const Number nothing[DIM] = {};
        for (int64_t i = 0; i < length; i += SIZE) {
            const int64_t second = i + SIZE - 1;
            for (int64_t r = i; r <= second; ++r) announce(from, r, step);
            T::join(from + i * step, second < length ? from + second * step : nothing, &rows[i / SIZE * DIM], DIM);
        }
    }

    void score(int64_t first, int64_t rows, int64_t columns) {
        multiply<T>(factors(queries) + first * DEPTH, DEPTH, 1, key_columns.data(), room, DEPTH, rows, columns, scores.data(), room);
    }

    // From the scores of row r, the query at a place, and the gradients of its shares: the shares and the scores' gradients.
    void spread(int64_t place, int64_t r, int64_t columns, float log_sum) {
        const int64_t end = seen(place, 1);
        float *own = &scores[r * room], *gradients = &share_gradients[r * room];
        std::fill(own + end, own + columns, -INFINITY);
        Vec total{};
        for (int64_t c = 0; c < columns; c += LANES) {
            const Vec share = exponential(load(own + c) - log_sum);
            total += share * load(gradients + c);
            store(own + c, share);
        }
        const float mean = sum(total);
        for (int64_t c = 0; c < columns; c += LANES) {
            const Vec share = load(own + c);
            store(&shares[r * room + c], share);
            store(&score_gradients[r * room + c], share * (load(gradients + c) - mean));
        }
        std::fill_n(&shares[r * room + columns], room - columns, 0);
        std::fill_n(&score_gradients[r * room + columns], room - columns, 0);
    }

    // The gradient of a row of queries or keys from that of what was made of it, which it overwrites.
    void turn_back(const Turn<T, DIM>& turn, int64_t sequence, int64_t head, Part part, int64_t place, float* gradient, float* weight_gradient) const {
        const int64_t at = place * qkv_step();
        turn.apply_backward(projected(sequence, head, part) + at, place, gradient, projected_gradient(sequence, head, part) + at, weight_gradient);
    }

    void make_room_for_gradients() {
        if (!key_rows.empty()) return;
        share_gradients.resize(MOST_ROWS * room);
        score_gradients.resize(MOST_ROWS * room);
        for (auto* rows : {&key_rows, &query_rows, &gradient_rows}) rows->resize(room / SIZE * DIM);
        value_columns.resize(DEPTH * room);
        for (auto* square : {&share_rows, &score_rows}) square->resize(room / SIZE * room);
    }

    const Attention& t;
    const int64_t length, room;
    const Turn<T, DIM> query_turn, key_turn;
    // Rows of one number after another; the scores, shares and their gradients of MOST_ROWS queries at a time.
    Numbers<Number> queries, keys;
    Numbers<float> scores, share_gradients;
    Numbers<Number> shares, score_gradients;
    Numbers<float> sums;
    // *_columns (DEPTH, room): a row's factors below each other. *_rows (room / SIZE, dim): SIZE rows as one of factors.
    Numbers<Factor> key_columns, value_columns;
    Numbers<Factor> value_rows, key_rows, query_rows, gradient_rows;
    Numbers<Factor> share_rows, score_rows;  // (room / SIZE, room), of all queries
};

template <class T, int DIM>
void forward(const Attention& t) {
#pragma omp parallel num_threads(static_cast<int>(t.threads))
    {
        Head<T, DIM> head(t);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < t.batch * t.heads; ++i) head.forward(i / t.heads, i % t.heads);
    }
}

template <class T, int DIM>
void backward(const Attention& t) {
    std::vector<float> weight_gradients(t.threads * 2 * DIM);
#pragma omp parallel num_threads(static_cast<int>(t.threads))
    {
        Head<T, DIM> head(t);
        Numbers<float> own(2 * DIM);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < t.batch * t.heads; ++i) head.backward(i / t.heads, i % t.heads, own.data());
        std::copy(own.begin(), own.end(), &weight_gradients[omp_get_thread_num() * 2 * DIM]);
    }
    for (int64_t d = 0; d < DIM; ++d) {
        t.query_weight_gradient[d] = t.key_weight_gradient[d] = 0;
        for (int64_t thread = 0; thread < t.threads; ++thread) {  // always in this order
            t.query_weight_gradient[d] += weight_gradients[thread * 2 * DIM + d];
            t.key_weight_gradient[d] += weight_gradients[(thread * 2 + 1) * DIM + d];
        }
    }
}

template <class T>
int attend(const Attention& t, bool is_forward) {
    switch (t.head_dim) {
        case 32: return is_forward ? forward<T, 32>(t) : backward<T, 32>(t), 1;
        case 64: return is_forward ? forward<T, 64>(t) : backward<T, 64>(t), 1;
        case 96: return is_forward ? forward<T, 96>(t) : backward<T, 96>(t), 1;
        case 128: return is_forward ? forward<T, 128>(t) : backward<T, 128>(t), 1;
        default: return 0;
    }
}

int attend(const Attention& t, bool is_forward) {
#ifdef __AVX512BF16__
    if (t.is_brief) return attend<Brief>(t, is_forward);
#endif
    return t.is_brief ? 0 : attend<Single>(t, is_forward);
}

}  // namespace

extern "C" {

int lanes() { return LANES; }

int has_brief() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

// They return 0 where there is no kernel for this head_dim and type.
int attend_forward(const Attention* task) { return attend(*task, true); }
int attend_backward(const Attention* task) { return attend(*task, false); }
}
