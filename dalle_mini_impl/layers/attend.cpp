// Attention of a whole training batch, forward and backward, on the cores of a CPU that multiplies bf16 (AVX512-BF16).
//
// PyTorch's operations write queries, keys, scores and their gradients to memory and read them again, a dozen times. Here
// one head of one sequence is done from its norms and rotations to its last gradient while it lies in the core's cache, and
// causal scores above the diagonal are left out. Products take bf16 and sum in fp32; all else is fp32. Threads share out
// sequences and heads; for one number of threads the bits are always the same.
//
// Compiled by compiled.py with -march=native; called through ctypes by native_attention.py.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

extern "C" {

// All contiguous. qkv and its gradient (batch, length, 3, heads, head_dim), mixed and its gradient (batch, length, heads,
// head_dim), all bf16. Weights of the norms of queries and keys (head_dim), and their gradients. cosines, sines (length,
// head_dim / 2), or null. log_sums (batch, heads, length): of each query's exponentials. head_dim: 32, 64, 96 or 128.
struct Attention {
    const uint16_t* qkv;
    const float *query_weight, *key_weight, *cosines, *sines;
    uint16_t* mixed;
    float* log_sums;
    const uint16_t* mixed_gradient;
    uint16_t* qkv_gradient;
    float *query_weight_gradient, *key_weight_gradient;
    int64_t batch, length, heads, head_dim, is_causal, threads;
};
}

#ifdef __AVX512BF16__
namespace {

constexpr int LANES = 16;
constexpr int MOST_ROWS = 6, MOST_VECTORS = 4;  // of a product's tile: its sums and what they need fill the 32 registers
constexpr float EPSILON = 1e-6f;

using Vec = __m512;
using Brief = uint16_t;   // a bf16 number
using Pair = uint32_t;    // two of them that one instruction multiplies and sums, the first in the lower half

inline int64_t rounded_up(int64_t number, int64_t step) { return (number + step - 1) / step * step; }

inline Vec load(const float* from) { return _mm512_loadu_ps(from); }

inline Vec load(const Brief* from) {
    const __m256i brief = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(brief), 16));
}

inline __m256i rounded(Vec value) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)); }

inline void store(float* to, Vec value) { _mm512_storeu_ps(to, value); }
inline void store(Brief* to, Vec value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded(value)); }

inline Vec all(float value) { return _mm512_set1_ps(value); }

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

// e^x to about 1e-7 of its size; 0 for what is below -87.
inline Vec exponential(Vec x) {
    x = _mm512_max_ps(x, all(-104.0f));
    const Vec whole = _mm512_roundscale_ps(_mm512_mul_ps(x, all(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Vec rest = _mm512_fnmadd_ps(whole, all(-2.12194440e-4f), _mm512_fnmadd_ps(whole, all(0.693359375f), x));
    Vec power = all(1.3888889e-3f);
    for (float coefficient : {8.3333333e-3f, 4.1666667e-2f, 0.16666667f, 0.5f, 1.0f, 1.0f})
        power = _mm512_fmadd_ps(power, rest, all(coefficient));
    return _mm512_scalef_ps(power, whole);
}

// out[r][c] = sum over p of the products of pair (r, p) of a and pair (p, c) of b, for ROWS rows and VECTORS × 16 columns.
// Pair (r, p) of a stands at a[r * a_row + p * a_step], pair (p, c) of b at b[p * b_step + c].
template <int ROWS, int VECTORS>
void multiply_tile(const Pair* a, int64_t a_row, int64_t a_step, const Pair* b, int64_t b_step, int64_t pairs, float* out, int64_t out_row) {
    Vec sums[ROWS][VECTORS];
    for (auto& row : sums)
        for (Vec& total : row) total = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; ++p) {
        __m512bh columns[VECTORS];
        for (int v = 0; v < VECTORS; ++v) columns[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + p * b_step + v * LANES));
        for (int r = 0; r < ROWS; ++r) {
            const auto row = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int32_t>(a[r * a_row + p * a_step])));
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], row, columns[v]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) store(out + r * out_row + v * LANES, sums[r][v]);
}

using Tile = void (*)(const Pair*, int64_t, int64_t, const Pair*, int64_t, int64_t, float*, int64_t);
template <int ROWS>
constexpr Tile TILES_OF[MOST_VECTORS] = {multiply_tile<ROWS, 1>, multiply_tile<ROWS, 2>, multiply_tile<ROWS, 3>, multiply_tile<ROWS, 4>};
constexpr const Tile* TILES[MOST_ROWS] = {TILES_OF<1>, TILES_OF<2>, TILES_OF<3>, TILES_OF<4>, TILES_OF<5>, TILES_OF<6>};

// As multiply_tile, for any number of rows and of columns that is a multiple of 16.
void multiply(const Pair* a, int64_t a_row, int64_t a_step, const Pair* b, int64_t b_step, int64_t pairs, int64_t rows, int64_t columns, float* out,
              int64_t out_row) {
    for (int64_t c = 0; c < columns; c += MOST_VECTORS * LANES) {
        const int64_t vectors = std::min<int64_t>(MOST_VECTORS, (columns - c) / LANES);
        for (int64_t r = 0; r < rows; r += MOST_ROWS) {
            const int64_t height = std::min<int64_t>(MOST_ROWS, rows - r);
            TILES[height - 1][vectors - 1](a + r * a_row, a_row, a_step, b + c, b_step, pairs, out + r * out_row + c, out_row);
        }
    }
}

// to[c] = the pair of first[c] and second[c], for `size` numbers, a multiple of 16.
inline void interleave(const Brief* first, const Brief* second, Pair* to, int64_t size) {
    for (int64_t c = 0; c < size; c += LANES) {
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + c)));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second + c)));
        _mm512_storeu_si512(to + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

// How the rows of a head are normed and turned, and the way back for gradients.
template <int DIM>
struct Turn {
    const float *weight, *cosines, *sines;  // cosines and sines null where nothing turns
    float scale;  // of what comes out

    // Centred and scaled to a variance of 1: row (dim) to normed; returns the scale.
    float normalize(const Brief* row, float* normed) const {
        Vec total = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
        for (int64_t d = 0; d < DIM; d += LANES) total = _mm512_add_ps(total, load(row + d));
        const Vec mean = all(_mm512_reduce_add_ps(total) / DIM);
        for (int64_t d = 0; d < DIM; d += LANES) {
            const Vec centred = _mm512_sub_ps(load(row + d), mean);
            squares = _mm512_fmadd_ps(centred, centred, squares);
            store(normed + d, centred);
        }
        const float factor = 1 / std::sqrt(_mm512_reduce_add_ps(squares) / DIM + EPSILON);
        for (int64_t d = 0; d < DIM; d += LANES) store(normed + d, _mm512_mul_ps(load(normed + d), all(factor)));
        return factor;
    }

    // The row (dim) at a place of the sequence, as scores take it.
    void apply(const Brief* row, int64_t place, Brief* to) const {
        alignas(64) float normed[DIM];
        normalize(row, normed);
        const int64_t half = DIM / 2;
        for (int64_t d = 0; d < half; d += LANES) {
            const Vec a = _mm512_mul_ps(load(normed + d), _mm512_mul_ps(load(weight + d), all(scale)));
            const Vec b = _mm512_mul_ps(load(normed + half + d), _mm512_mul_ps(load(weight + half + d), all(scale)));
            const Vec cosine = cosines ? load(cosines + place * half + d) : all(1), sine = cosines ? load(sines + place * half + d) : all(0);
            store(to + d, _mm512_fmsub_ps(a, cosine, _mm512_mul_ps(b, sine)));
            store(to + half + d, _mm512_fmadd_ps(b, cosine, _mm512_mul_ps(a, sine)));
        }
    }

    // From the gradient (dim) of what `apply` has made of a row, which it overwrites, the row's own; adds the weight's.
    void apply_backward(const Brief* row, int64_t place, float* gradient, Brief* to, float* weight_gradient) const {
        alignas(64) float normed[DIM];
        const float factor = normalize(row, normed);
        const int64_t half = DIM / 2;
        for (int64_t d = 0; d < half; d += LANES) {
            const Vec a = _mm512_mul_ps(load(gradient + d), all(scale)), b = _mm512_mul_ps(load(gradient + half + d), all(scale));
            const Vec cosine = cosines ? load(cosines + place * half + d) : all(1), sine = cosines ? load(sines + place * half + d) : all(0);
            store(gradient + d, _mm512_fmadd_ps(a, cosine, _mm512_mul_ps(b, sine)));
            store(gradient + half + d, _mm512_fmsub_ps(b, cosine, _mm512_mul_ps(a, sine)));
        }
        Vec total = _mm512_setzero_ps(), along = _mm512_setzero_ps();
        for (int64_t d = 0; d < DIM; d += LANES) {
            const Vec turned_back = load(gradient + d), own = load(normed + d);
            store(weight_gradient + d, _mm512_fmadd_ps(turned_back, own, load(weight_gradient + d)));
            const Vec weighted = _mm512_mul_ps(turned_back, load(weight + d));
            total = _mm512_add_ps(total, weighted);
            along = _mm512_fmadd_ps(weighted, own, along);
            store(gradient + d, weighted);
        }
        const Vec mean = all(_mm512_reduce_add_ps(total) / DIM), share = all(_mm512_reduce_add_ps(along) / DIM);
        for (int64_t d = 0; d < DIM; d += LANES) {
            const Vec rest = _mm512_sub_ps(load(gradient + d), _mm512_fmadd_ps(load(normed + d), share, mean));
            store(to + d, _mm512_mul_ps(rest, all(factor)));
        }
    }
};

// One head of one sequence, and the scratch of the thread that works on it. `room`: length, rounded up to whole vectors;
// what lies beyond the length is zero.
template <int DIM>
class Head {
public:
    explicit Head(const Attention& task)
        : t(task),
          length(task.length),
          room(rounded_up(task.length, LANES)),
          query_turn{task.query_weight, task.cosines, task.sines, 1 / std::sqrt(static_cast<float>(DIM))},
          key_turn{task.key_weight, task.cosines, task.sines, 1},
          queries(room * DIM),
          scores(MOST_ROWS * room),
          shares(MOST_ROWS * room),
          sums(MOST_ROWS * DIM),
          key_columns(DIM / 2 * room),
          value_rows(room / 2 * DIM) {}

    void forward(int64_t sequence, int64_t head) {
        read_queries(sequence, head);
        read_keys(sequence, head, nullptr);
        read_pairs(row(t.qkv, sequence, head, 2), 3 * t.heads * DIM, value_rows);
        float* log_sums = t.log_sums + (sequence * t.heads + head) * length;
        Brief* mixed = t.mixed + (sequence * length * t.heads + head) * DIM;
        for (int64_t first = 0; first < length; first += MOST_ROWS) {
            const int64_t rows = std::min<int64_t>(MOST_ROWS, length - first), columns = seen(first + rows - 1, LANES);
            score(first, rows, columns);
            float scales[MOST_ROWS];
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t end = seen(first + r, 1);
                float* own = &scores[r * room];
                std::fill(own + end, own + columns, -INFINITY);
                Vec best = all(-INFINITY), total = _mm512_setzero_ps();
                for (int64_t c = 0; c < columns; c += LANES) best = _mm512_max_ps(best, load(own + c));
                const float most = _mm512_reduce_max_ps(best);
                for (int64_t c = 0; c < columns; c += LANES) {
                    const Vec share = exponential(_mm512_sub_ps(load(own + c), all(most)));
                    total = _mm512_add_ps(total, share);
                    store(&shares[r * room + c], share);
                }
                const float sum = _mm512_reduce_add_ps(total);
                scales[r] = 1 / sum;
                log_sums[first + r] = most + std::log(sum);
            }
            multiply(pairs(shares), room / 2, 1, value_rows.data(), DIM, columns / 2, rows, DIM, sums.data(), DIM);
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t d = 0; d < DIM; d += LANES)
                    store(mixed + (first + r) * t.heads * DIM + d, _mm512_mul_ps(load(&sums[r * DIM + d]), all(scales[r])));
        }
    }

    // weight_gradient (2, dim): those of the queries' and the keys' norms, which it adds to.
    void backward(int64_t sequence, int64_t head, float* weight_gradient) {
        make_room_for_gradients();
        read_queries(sequence, head);
        read_keys(sequence, head, &key_rows);
        read_columns(row(t.qkv, sequence, head, 2), 3 * t.heads * DIM, value_columns);
        const Brief* gradient = t.mixed_gradient + (sequence * length * t.heads + head) * DIM;
        read_pairs(gradient, t.heads * DIM, gradient_rows);
        for (int64_t i = 0; i < room / 2; ++i) interleave(&queries[2 * i * DIM], &queries[(2 * i + 1) * DIM], &query_rows[i * DIM], DIM);
        const float* log_sums = t.log_sums + (sequence * t.heads + head) * length;
        for (int64_t first = 0; first < length; first += MOST_ROWS) {
            const int64_t rows = std::min<int64_t>(MOST_ROWS, length - first), columns = seen(first + rows - 1, LANES);
            score(first, rows, columns);
            const auto* own_gradient = reinterpret_cast<const Pair*>(gradient + first * t.heads * DIM);
            multiply(own_gradient, t.heads * DIM / 2, 1, value_columns.data(), room, DIM / 2, rows, columns, share_gradients.data(), room);
            for (int64_t r = 0; r < rows; ++r) spread(first + r, r, columns, log_sums[first + r]);
            for (int64_t r = rows; r < rounded_up(rows, 2); ++r) {  // the pair of a last odd row
                std::fill_n(&shares[r * room], room, 0);
                std::fill_n(&score_gradients[r * room], room, 0);
            }
            for (int64_t r = 0; r < rows; r += 2) {
                interleave(&shares[r * room], &shares[(r + 1) * room], &share_pairs[(first + r) / 2 * room], room);
                interleave(&score_gradients[r * room], &score_gradients[(r + 1) * room], &score_pairs[(first + r) / 2 * room], room);
            }
            multiply(pairs(score_gradients), room / 2, 1, key_rows.data(), DIM, columns / 2, rows, DIM, sums.data(), DIM);
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t at = (first + r) * 3 * t.heads * DIM;
                query_turn.apply_backward(row(t.qkv, sequence, head, 0) + at, first + r, &sums[r * DIM], row(t.qkv_gradient, sequence, head, 0) + at,
                                          weight_gradient);
            }
        }
        const int64_t query_pairs = (length + 1) / 2;
        for (int64_t first = 0; first < room; first += MOST_VECTORS * LANES) {
            const int64_t columns = std::min<int64_t>(MOST_VECTORS * LANES, room - first), start = t.is_causal ? first / 2 : 0;
            const int64_t count = std::max<int64_t>(query_pairs - start, 0);
            multiply(&query_rows[start * DIM], 1, DIM, &score_pairs[start * room + first], room, count, DIM, columns, &key_gradients[first], room);
            multiply(&gradient_rows[start * DIM], 1, DIM, &share_pairs[start * room + first], room, count, DIM, columns, &value_gradients[first], room);
        }
        for (int64_t j = 0; j < length; ++j) {
            const int64_t at = j * 3 * t.heads * DIM;
            for (int64_t d = 0; d < DIM; ++d) sums[d] = key_gradients[d * room + j], sums[DIM + d] = value_gradients[d * room + j];
            key_turn.apply_backward(row(t.qkv, sequence, head, 1) + at, j, sums.data(), row(t.qkv_gradient, sequence, head, 1) + at, weight_gradient + DIM);
            Brief* to = row(t.qkv_gradient, sequence, head, 2) + at;
            for (int64_t d = 0; d < DIM; d += LANES) store(to + d, load(&sums[DIM + d]));
        }
    }

private:
    // Where the queries (0), keys (1) or values (2) of a head begin; rows are 3 * heads * dim numbers apart.
    template <typename T>
    T* row(T* qkv, int64_t sequence, int64_t head, int64_t which) const {
        return qkv + ((sequence * length * 3 + which) * t.heads + head) * DIM;
    }

    static const Pair* pairs(const Numbers<Brief>& numbers) { return reinterpret_cast<const Pair*>(numbers.data()); }

    // How many keys the query at a place sees, rounded up.
    int64_t seen(int64_t place, int64_t step) const { return rounded_up(t.is_causal ? place + 1 : length, step); }

    void read_queries(int64_t sequence, int64_t head) {
        const Brief* from = row(t.qkv, sequence, head, 0);
        for (int64_t i = 0; i < length; ++i) query_turn.apply(from + i * 3 * t.heads * DIM, i, &queries[i * DIM]);
    }

    // Keys as columns, and where `also_rows` is there, as rows, too.
    void read_keys(int64_t sequence, int64_t head, Numbers<Pair>* also_rows) {
        const Brief* from = row(t.qkv, sequence, head, 1);
        alignas(64) Brief two[2][DIM];
        for (int64_t j = 0; j < length; ++j) {
            Brief* own = two[j % 2];
            key_turn.apply(from + j * 3 * t.heads * DIM, j, own);
            put_column(own, j, key_columns);
            if (!also_rows || (j % 2 == 0 && j + 1 < length)) continue;
            if (j % 2 == 0) std::fill_n(two[1], DIM, 0);
            interleave(two[0], two[1], &(*also_rows)[j / 2 * DIM], DIM);
        }
    }

    void put_column(const Brief* numbers, int64_t j, Numbers<Pair>& columns) const {
        alignas(64) Pair own[DIM / 2];
        std::memcpy(own, numbers, DIM * sizeof(Brief));
        for (int64_t p = 0; p < DIM / 2; ++p) columns[p * room + j] = own[p];
    }

    // Rows (dim) that stand `step` numbers apart, as columns of pairs (dim / 2, room).
    void read_columns(const Brief* from, int64_t step, Numbers<Pair>& columns) const {
        for (int64_t j = 0; j < length; ++j) put_column(from + j * step, j, columns);
    }

    // The same rows, two after each other as a row of pairs (room / 2, dim).
    void read_pairs(const Brief* from, int64_t step, Numbers<Pair>& rows) const {
        alignas(64) const Brief nothing[DIM] = {};
        for (int64_t i = 0; i < length; i += 2)
            interleave(from + i * step, i + 1 < length ? from + (i + 1) * step : nothing, &rows[i / 2 * DIM], DIM);
    }

    void score(int64_t first, int64_t rows, int64_t columns) {
        multiply(pairs(queries) + first * DIM / 2, DIM / 2, 1, key_columns.data(), room, DIM / 2, rows, columns, scores.data(), room);
    }

    // From the scores of row r, the query at a place, and the gradients of its shares: the shares and the scores' gradients.
    void spread(int64_t place, int64_t r, int64_t columns, float log_sum) {
        const int64_t end = seen(place, 1);
        float *own = &scores[r * room], *gradients = &share_gradients[r * room];
        std::fill(own + end, own + columns, -INFINITY);
        Vec total = _mm512_setzero_ps();
        for (int64_t c = 0; c < columns; c += LANES) {
            const Vec share = exponential(_mm512_sub_ps(load(own + c), all(log_sum)));
            total = _mm512_fmadd_ps(share, load(gradients + c), total);
            store(own + c, share);
        }
        const Vec mean = all(_mm512_reduce_add_ps(total));
        for (int64_t c = 0; c < columns; c += LANES) {
            const Vec share = load(own + c);
            store(&shares[r * room + c], share);
            store(&score_gradients[r * room + c], _mm512_mul_ps(share, _mm512_sub_ps(load(gradients + c), mean)));
        }
        std::fill_n(&shares[r * room + columns], room - columns, 0);
        std::fill_n(&score_gradients[r * room + columns], room - columns, 0);
    }

    void make_room_for_gradients() {
        if (!key_rows.empty()) return;
        share_gradients.resize(MOST_ROWS * room);
        score_gradients.resize(MOST_ROWS * room);
        for (auto* rows : {&key_rows, &query_rows, &gradient_rows}) rows->resize(room / 2 * DIM);
        value_columns.resize(DIM / 2 * room);
        for (auto* square : {&share_pairs, &score_pairs}) square->resize(room / 2 * room);
        for (auto* gradients : {&key_gradients, &value_gradients}) gradients->resize(DIM * room);
    }

    const Attention& t;
    const int64_t length, room;
    const Turn<DIM> query_turn, key_turn;
    // Rows of one bf16 number after another; the scores, shares and their gradients of MOST_ROWS queries at a time.
    Numbers<Brief> queries;
    Numbers<float> scores, share_gradients;
    Numbers<Brief> shares, score_gradients;
    Numbers<float> sums;
    // *_columns (dim / 2, room): a row's pairs below each other. *_rows (room / 2, dim): two rows as one row of pairs.
    Numbers<Pair> key_columns, value_columns;
    Numbers<Pair> value_rows, key_rows, query_rows, gradient_rows;
    Numbers<Pair> share_pairs, score_pairs;  // (room / 2, room), rows in pairs
    Numbers<float> key_gradients, value_gradients;  // (dim, room)
};

template <int DIM>
void forward(const Attention& t) {
#pragma omp parallel num_threads(static_cast<int>(t.threads))
    {
        Head<DIM> head(t);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < t.batch * t.heads; ++i) head.forward(i / t.heads, i % t.heads);
    }
}

template <int DIM>
void backward(const Attention& t) {
    std::vector<float> weight_gradients(t.threads * 2 * DIM);
#pragma omp parallel num_threads(static_cast<int>(t.threads))
    {
        Head<DIM> head(t);
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

}  // namespace

// They return 0 where there is no kernel for this head_dim.
extern "C" int attend_forward(const Attention* task) {
    switch (task->head_dim) {
        case 32: return forward<32>(*task), 1;
        case 64: return forward<64>(*task), 1;
        case 96: return forward<96>(*task), 1;
        case 128: return forward<128>(*task), 1;
        default: return 0;
    }
}

extern "C" int attend_backward(const Attention* task) {
    switch (task->head_dim) {
        case 32: return backward<32>(*task), 1;
        case 64: return backward<64>(*task), 1;
        case 96: return backward<96>(*task), 1;
        case 128: return backward<128>(*task), 1;
        default: return 0;
    }
}
#endif
