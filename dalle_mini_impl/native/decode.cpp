// One pass of the packed transformer (engine.py) over a few new tokens of each sequence, on the cores of a CPU, and the
// choice of the next tokens from its logits.
//
// A step of decoding is so little work that PyTorch's calls take longer than what they call for. Here the whole trunk
// is one parallel region: threads share out panels of weights, sequences or heads, and meet at barriers in between.
// Each row's numbers are computed in an order that depends on nothing else in the batch, so its bits don't either.
//
// Residual stream, norms, scores and sums are fp32; weights, keys and values are float or, with a CPU that multiplies
// them (AVX512-BF16), bf16. Compiled by compiled.py with -march=native; called through ctypes by native/trunk.py.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

extern "C" {

// Weights lie in panels of output channels (see `pack` in trunk.py), tables are (slots, 2, head_dim): queries, keys.
struct Layer {
    const void *qkv, *out, *up, *down;
    const float *cosines, *sines;
    const float *attention_mix, *ffn_mix;  // null without token shift
};

struct Model {
    int32_t layers, dim, heads, hidden, vocab, is_brief;
    const Layer* layer;
    const float* head;
};

// Keys (layers, batch, heads, chunks, …) and values (layers, batch, heads, capacity, head_dim), contiguous, of which
// `length` tokens are filled.
struct Cache {
    void *keys, *values;
    int64_t batch, chunks, capacity, length;
};

// All contiguous. x (batch, count, dim). cache: of each sequence alone; prompts: of what comes before it, which sequence
// b shares with others as row owners[b]; its length is 0 where there is none. last (layers, 2, batch, dim), latest the
// same with (count + 1) before dim, or null. slots (count): rows of the tables. logits (batch, count, vocab), or
// (batch, vocab) of the last tokens alone.
struct Pass {
    const float* x;
    Cache cache, prompts;
    const int64_t* owners;
    float *last, *latest, *logits;
    const int64_t* slots;
    int64_t batch, count, only_last, threads;
};

// What filters.py says, for logits (pictures, tokens, vocab) with a caption and, or null, without. scales (tokens).
// noise: that of a picture's first token; pictures are noise_stride numbers apart, tokens vocab numbers. top_k 0, top_p 1
// and min_p 0 filter nothing. ids, likelihoods, null_likelihoods (pictures, tokens): what is chosen and its log p.
struct Choice {
    const float *conditional, *null, *noise, *scales;
    int64_t* ids;
    float *likelihoods, *null_likelihoods;
    int64_t pictures, tokens, vocab, noise_stride, top_k, threads;
    float temperature, top_p, min_p;
};
}

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;             // numbers in a vector
#else
constexpr int LANES = 8;
#endif
constexpr int PANEL = 2 * LANES;      // output channels that are computed together
constexpr int MOST_ROWS = 6;          // rows that are multiplied by a panel at once: their sums fit into 16 registers
constexpr int BLOCK = 4 * MOST_ROWS;  // rows that a thread takes at a time
constexpr int SWEEP = 64;             // numbers of each value that are summed up at once
constexpr int AHEAD = 4096;           // bytes by which reading the cache is announced
constexpr float LEAST = std::numeric_limits<float>::lowest();
constexpr float EPSILON = 1e-6f;

typedef float Vec __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES), may_alias));
typedef float LooseVec __attribute__((vector_size(4 * LANES), may_alias, aligned(4)));

inline Vec load(const float* from) { return *reinterpret_cast<const LooseVec*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<LooseVec*>(to) = value; }

template <bool IS_WRITTEN = false>
inline void announce(const void* address) {
    __builtin_prefetch(address, IS_WRITTEN);
}

inline float sum(Vec v) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += v[i];
    return total;
}

inline float maximum(Vec v) {
    float best = v[0];
    for (int i = 1; i < LANES; ++i) best = v[i] > best ? v[i] : best;
    return best;
}

// e^x for x ≤ 0, to about 1e-7 of its size.
inline Vec exponential(Vec x) {
    const Vec lowest = Vec{} - 87.0f, shift = Vec{} + 12582912.0f;  // 1.5 × 2^23: adding it rounds to whole numbers
    x = x > lowest ? x : lowest;
    const Vec shifted = x * 1.44269504f + shift, whole = shifted - shift;
    const Vec rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Vec power = Vec{} + 1.3888889e-3f;
    for (float coefficient : {8.3333333e-3f, 4.1666667e-2f, 0.16666667f, 0.5f, 1.0f, 1.0f}) power = power * rest + coefficient;
    const IntVec exponent = (reinterpret_cast<const IntVec&>(shifted) - reinterpret_cast<const IntVec&>(shift)) << 23;
    const IntVec scaled = reinterpret_cast<const IntVec&>(power) + exponent;
    return reinterpret_cast<const Vec&>(scaled);
}

// to = (from - mean) / standard deviation, of `size` numbers.
inline void normalize(const float* from, float* to, int size) {
    Vec total{};
    for (int i = 0; i < size; i += LANES) total += load(from + i);
    const float mean = sum(total) / size;
    Vec squares{};
    for (int i = 0; i < size; i += LANES) {
        const Vec centred = load(from + i) - mean;
        squares += centred * centred;
    }
    const float scale = 1 / std::sqrt(sum(squares) / size + EPSILON);
    for (int i = 0; i < size; i += LANES) store(to + i, (load(from + i) - mean) * scale);
}

// What is particular to fp32: weights (panels, depth, PANEL), keys (chunks, head_dim, LANES), values (capacity, head_dim).
struct Single {
    using Number = float;

    static void convert(const float* from, float* to, int size) { std::memcpy(to, from, size * sizeof(float)); }

    template <int ROWS>
    static void multiply(const float* a, long stride, const float* panel, int depth, Vec (&sums)[ROWS][2]) {
        for (int k = 0; k < depth; ++k, panel += PANEL) {
            const Vec first = load(panel), second = load(panel + LANES);
            for (int row = 0; row < ROWS; ++row) {
                const float value = a[row * stride + k];
                sums[row][0] += value * first;
                sums[row][1] += value * second;
            }
        }
    }

    static void put_key(float* chunk, int lane, const float* key, int size) {
        for (int i = 0; i < size; ++i) chunk[i * LANES + lane] = key[i];
    }

    static Vec scores(const float* chunk, const float* query, int size, const float* later) {
        Vec parts[4] = {};
        for (int i = 0; i < size; i += 4)
            for (int part = 0; part < 4; ++part) {
                announce(later + (i + part) * LANES);
                parts[part] += query[i + part] * load(chunk + (i + part) * LANES);
            }
        return (parts[0] + parts[1]) + (parts[2] + parts[3]);
    }

    static Vec load_value(const float* from) { return load(from); }
};

#ifdef __AVX512BF16__
// The same for bf16: two neighbouring numbers of the depth lie side by side, as one instruction multiplies them.
struct Brief {
    using Number = uint16_t;

    static void convert(const float* from, uint16_t* to, int size) {
        for (int i = 0; i < size; i += LANES)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
    }

    static __m512bh pair(const uint16_t* at) {
        int32_t both;
        std::memcpy(&both, at, sizeof both);
        return (__m512bh)_mm512_set1_epi32(both);
    }

    static __m512bh pairs(const uint16_t* at) { return (__m512bh)_mm512_loadu_si512(at); }

    template <int ROWS>
    static void multiply(const uint16_t* a, long stride, const uint16_t* panel, int depth, Vec (&sums)[ROWS][2]) {
        for (int k = 0; k < depth; k += 2, panel += 2 * PANEL) {
            const __m512bh first = pairs(panel), second = pairs(panel + PANEL);
            for (int row = 0; row < ROWS; ++row) {
                const __m512bh value = pair(a + row * stride + k);
                sums[row][0] = (Vec)_mm512_dpbf16_ps((__m512)sums[row][0], value, first);
                sums[row][1] = (Vec)_mm512_dpbf16_ps((__m512)sums[row][1], value, second);
            }
        }
    }

    static void put_key(uint16_t* chunk, int lane, const uint16_t* key, int size) {
        for (int i = 0; i < size; i += 2) std::memcpy(chunk + (i * LANES + 2 * lane), key + i, 2 * sizeof(uint16_t));
    }

    static Vec scores(const uint16_t* chunk, const uint16_t* query, int size, const uint16_t* later) {
        __m512 parts[4] = {};
        for (int i = 0; i < size; i += 8)
            for (int part = 0; part < 4; ++part) {
                const int k = i + 2 * part;
                announce(later + k * LANES);
                parts[part] = _mm512_dpbf16_ps(parts[part], pair(query + k), pairs(chunk + k * LANES));
            }
        return (Vec)_mm512_add_ps(_mm512_add_ps(parts[0], parts[1]), _mm512_add_ps(parts[2], parts[3]));
    }

    static Vec load_value(const uint16_t* from) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        return (Vec)_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
};
#endif

// One of the threads that work on a pass together.
struct Part {
    int thread, threads;

    int64_t begin(int64_t items) const { return items * thread / threads; }
    int64_t end(int64_t items) const { return items * (thread + 1) / threads; }
    void meet() const {
#pragma omp barrier
    }
};

// Rows (rows, depth) of `a`, `stride` apart, times a weight; `then` gets row, first channel and two vectors. Threads share
// out panels and, where there are many, rows.
template <class T, class Then>
void multiply(const typename T::Number* a, long stride, int rows, int depth, const void* weight, int channels,
              const Part& part, Then then) {
    const int panels = (channels + PANEL - 1) / PANEL, blocks = (rows + BLOCK - 1) / BLOCK;
    for (int64_t item = part.begin(panels * blocks); item < part.end(panels * blocks); ++item) {
        const int panel = static_cast<int>(item / blocks), begin = static_cast<int>(item % blocks) * BLOCK;
        const int end = begin + BLOCK < rows ? begin + BLOCK : rows;
        const auto* packed = static_cast<const typename T::Number*>(weight) + static_cast<long>(panel) * depth * PANEL;
        auto some = [&](auto number, int first) {
            constexpr int ROWS = decltype(number)::value;
            Vec sums[ROWS][2] = {};
            T::template multiply<ROWS>(a + first * stride, stride, packed, depth, sums);
            for (int row = 0; row < ROWS; ++row) then(first + row, panel * PANEL, sums[row][0], sums[row][1]);
        };
        int row = begin;
        for (; row + MOST_ROWS <= end; row += MOST_ROWS) some(std::integral_constant<int, MOST_ROWS>{}, row);
        switch (end - row) {
            case 5: some(std::integral_constant<int, 5>{}, row); break;
            case 4: some(std::integral_constant<int, 4>{}, row); break;
            case 3: some(std::integral_constant<int, 3>{}, row); break;
            case 2: some(std::integral_constant<int, 2>{}, row); break;
            case 1: some(std::integral_constant<int, 1>{}, row); break;
            default: break;
        }
    }
}

inline int padded(int channels) { return (channels + PANEL - 1) / PANEL * PANEL; }

// What the threads share. Rows are (sequence, token); their strides are whole panels, so that every store is whole.
template <class T>
struct Pad {
    std::vector<float> x, qkv;
    std::vector<typename T::Number> normed, mixed, inner;

    void fit(int rows, const Model& m) {
        auto grow = [](auto& values, size_t size) {
            if (values.size() < size) values.resize(size);
        };
        grow(x, static_cast<size_t>(rows) * padded(m.dim));
        grow(qkv, static_cast<size_t>(rows) * padded(3 * m.dim));
        grow(normed, static_cast<size_t>(rows) * m.dim);
        grow(mixed, static_cast<size_t>(rows) * m.dim);
        grow(inner, static_cast<size_t>(rows) * padded(m.hidden));
    }
};

// This thread's sequences: normed = norm(x), mixed with the token before where there is a mix.
template <class T>
void norm_and_shift(const Model& m, const Pass& p, const Part& part, Pad<T>& pad, const float* mix, int layer, int which,
                    float* own) {
    const int dim = m.dim;
    const long place = static_cast<long>(layer) * 2 + which;
    float *now = own, *before = own + dim, *blend = own + 2 * dim;
    for (int64_t b = part.begin(p.batch); b < part.end(p.batch); ++b) {
        float* last = p.last + (place * p.batch + b) * dim;
        float* latest = p.latest ? p.latest + (place * p.batch + b) * (p.count + 1) * dim : nullptr;
        if (mix) std::memcpy(before, last, dim * sizeof(float));
        if (mix && latest) std::memcpy(latest, last, dim * sizeof(float));
        for (int64_t j = 0; j < p.count; ++j) {
            const int64_t row = b * p.count + j;
            normalize(&pad.x[row * padded(dim)], now, dim);
            if (!mix) {
                T::convert(now, &pad.normed[row * dim], dim);
                continue;
            }
            for (int i = 0; i < dim; i += LANES) {
                const Vec here = load(now + i);
                store(blend + i, here + load(mix + i) * (load(before + i) - here));
            }
            T::convert(blend, &pad.normed[row * dim], dim);
            if (latest) std::memcpy(latest + (j + 1) * dim, now, dim * sizeof(float));
            std::swap(now, before);
        }
        if (mix) std::memcpy(last, before, dim * sizeof(float));
    }
}

// Normalizes and turns one query or key by its slot's tables, which hold the norm's weight, too.
inline void turn(const float* from, const float* cosines, const float* sines, float* normed, float* to, int size) {
    normalize(from, normed, size);
    const int half = size / 2;
    for (int i = 0; i < half; ++i) to[i] = normed[i] * cosines[i] + normed[i + half] * sines[i];
    for (int i = half; i < size; ++i) to[i] = normed[i] * cosines[i] + normed[i - half] * sines[i];
}

// Keys and values of one head for the first `seen` of successive tokens, and what is read after each.
template <class T>
struct Stretch {
    using Number = typename T::Number;
    Number *keys, *values;
    const Number *after_keys = nullptr, *after_values = nullptr;
    int64_t seen = 0;

    Stretch(const Cache& cache, int layer, int64_t row, int head, int heads, int size) {
        const int64_t item = (layer * cache.batch + row) * heads + head;
        keys = static_cast<Number*>(cache.keys) + item * cache.chunks * LANES * size;
        values = static_cast<Number*>(cache.values) + item * cache.capacity * size;
    }

    int64_t chunks() const { return (seen + LANES - 1) / LANES; }

    // Adds the token at a place; `brief` has room for a key.
    void put(int64_t place, const float* key, const float* value, int size, Number* brief) {
        T::convert(key, brief, size);
        T::put_key(keys + place / LANES * LANES * size, place % LANES, brief, size);
        T::convert(value, values + place * size, size);
    }

    // Scores of a query, to whole chunks, and -∞ behind the last; returns the larger of these and `best` in each lane.
    Vec score(const Number* query, int size, float* scores, Vec best) const {
        const int64_t chunk_size = LANES * size, bytes = chunk_size * sizeof(Number), ahead = (AHEAD + bytes - 1) / bytes;
        for (int64_t c = 0; c < chunks(); ++c, scores += LANES) {
            const Number* later =
                c + ahead < chunks() ? keys + (c + ahead) * chunk_size : after_keys + (c + ahead - chunks()) * chunk_size;
            store(scores, T::scores(keys + c * chunk_size, query, size, later));
            for (int64_t i = seen - c * LANES; i < LANES; ++i) scores[i] = -std::numeric_limits<float>::infinity();
            const Vec found = load(scores);
            best = found > best ? found : best;
        }
        return best;
    }

    // Adds `width` vectors of each value, times its weight.
    template <int MOST>
    void add_values(const float* weights, int first, int width, int size, Vec (&sums)[MOST]) const {
        const int64_t bytes = size * sizeof(Number), ahead = (AHEAD + bytes - 1) / bytes;
        const Number* value = values + first;
        if (width < MOST) {
            for (int64_t i = 0; i < seen; ++i, value += size)
                for (int v = 0; v < width; ++v) sums[v] += weights[i] * T::load_value(value + v * LANES);
            return;
        }
        for (int64_t i = 0; i < seen; ++i, value += size) {
            const Number* later = i + ahead < seen ? value + ahead * size : after_values + (i + ahead - seen) * size;
            for (int line = 0; line < MOST * LANES; line += 64 / sizeof(Number)) announce(later + line);
            for (int v = 0; v < MOST; ++v) sums[v] += weights[i] * T::load_value(value + v * LANES);
        }
    }
};

// This thread's heads: writes keys and values of the new tokens behind those in the cache, and mixes them all.
template <class T>
void attend(const Model& m, const Pass& p, const Part& part, Pad<T>& pad, int layer, float* own) {
    const int heads = m.heads, size = m.dim / heads, stride = padded(3 * m.dim);
    const Layer& weights = m.layer[layer];
    float *normed = own, *turned = own + size, *shares = own + 2 * size;
    auto* brief = reinterpret_cast<typename T::Number*>(shares + (p.prompts.chunks + p.cache.chunks) * LANES);
    const int64_t items = p.batch * heads;
    for (int64_t item = part.begin(items); item < part.end(items); ++item) {
        const int64_t b = item / heads;
        const int h = static_cast<int>(item % heads);
        Stretch<T> latest(p.cache, layer, b, h, heads, size), prompt = latest;
        latest.after_keys = latest.values;
        latest.after_values = latest.keys + p.cache.chunks * LANES * size;  // the next item's keys
        if (p.prompts.length) {
            prompt = Stretch<T>(p.prompts, layer, p.owners[b], h, heads, size);
            prompt.after_keys = latest.keys;
            prompt.after_values = latest.values;
            prompt.seen = p.prompts.length;
        }
        const auto* next_chunk = latest.after_values + p.cache.length / LANES * LANES * size;  // to which it will add
        for (int i = 0; i < LANES * size; i += 64 / sizeof(*brief)) announce<true>(next_chunk + i);
        for (int64_t j = 0; j < p.count; ++j) {
            const float* row = &pad.qkv[(b * p.count + j) * stride + h * size];
            const int64_t table = (p.slots[j] * 2 + 1) * size;
            turn(row + m.dim, weights.cosines + table, weights.sines + table, normed, turned, size);
            latest.put(p.cache.length + j, turned, row + 2 * m.dim, size, brief);
        }
        for (int64_t j = 0; j < p.count; ++j) {
            const float* row = &pad.qkv[(b * p.count + j) * stride + h * size];
            const int64_t table = p.slots[j] * 2 * size;
            turn(row, weights.cosines + table, weights.sines + table, normed, turned, size);
            T::convert(turned, brief, size);
            latest.seen = p.cache.length + j + 1;
            float* latest_shares = shares + prompt.chunks() * LANES;
            Vec best = Vec{} - std::numeric_limits<float>::infinity();
            best = prompt.score(brief, size, shares, best);
            best = latest.score(brief, size, latest_shares, best);
            const float largest = maximum(best);
            Vec totals{};
            for (float* at = shares; at < latest_shares + latest.chunks() * LANES; at += LANES) {
                const Vec share = exponential(load(at) - largest);  // of -∞ it is too little to count
                store(at, share);
                totals += share;
            }
            const float scale = 1 / sum(totals);
            for (int first = 0; first < size; first += SWEEP) {
                constexpr int MOST = SWEEP / LANES;
                const int width = size - first < SWEEP ? (size - first) / LANES : MOST;
                Vec sums[MOST] = {};
                prompt.add_values(shares, first, width, size, sums);
                latest.add_values(latest_shares, first, width, size, sums);
                for (int v = 0; v < width; ++v) store(turned + first + v * LANES, sums[v] * scale);
            }
            T::convert(turned, &pad.mixed[(b * p.count + j) * m.dim + h * size], size);
        }
    }
}

// One thread's part of a whole pass.
template <class T>
void forward(const Model& m, const Pass& p, const Part& part, Pad<T>& pad) {
    const int dim = m.dim, hidden = m.hidden;
    const int rows = static_cast<int>(p.batch * p.count);
    const long x_stride = padded(dim), qkv_stride = padded(3 * dim), inner_stride = padded(hidden);
    float *x = pad.x.data(), *qkv = pad.qkv.data();
    auto *normed = pad.normed.data(), *mixed = pad.mixed.data(), *inner = pad.inner.data();
    std::vector<float> own(3 * dim + (p.prompts.chunks + p.cache.chunks + 4) * LANES);
    auto keep = [&](int row, int channel, Vec one, Vec two) {
        store(qkv + row * qkv_stride + channel, one);
        store(qkv + row * qkv_stride + channel + LANES, two);
    };
    auto add = [&](int row, int channel, Vec one, Vec two) {
        float* to = x + row * x_stride + channel;
        store(to, load(to) + one);
        store(to + LANES, load(to + LANES) + two);
    };
    auto square = [&](int row, int channel, Vec one, Vec two) {
        alignas(64) float squares[PANEL];
        const Vec a = one > 0 ? one : Vec{}, b = two > 0 ? two : Vec{};
        store(squares, a * a);
        store(squares + LANES, b * b);
        T::convert(squares, inner + row * inner_stride + channel, PANEL);
    };
    for (int64_t row = part.begin(rows); row < part.end(rows); ++row)
        std::memcpy(x + row * x_stride, p.x + row * dim, dim * sizeof(float));
    part.meet();
    for (int index = 0; index < m.layers; ++index) {
        const Layer& layer = m.layer[index];
        norm_and_shift(m, p, part, pad, layer.attention_mix, index, 0, own.data());
        part.meet();
        multiply<T>(normed, dim, rows, dim, layer.qkv, 3 * dim, part, keep);
        part.meet();
        attend(m, p, part, pad, index, own.data());
        part.meet();
        multiply<T>(mixed, dim, rows, dim, layer.out, dim, part, add);
        part.meet();
        norm_and_shift(m, p, part, pad, layer.ffn_mix, index, 1, own.data());
        part.meet();
        multiply<T>(normed, dim, rows, dim, layer.up, hidden, part, square);
        part.meet();
        multiply<T>(inner, inner_stride, rows, hidden, layer.down, dim, part, add);
        part.meet();
    }
    const int64_t outputs = p.only_last ? p.batch : rows;
    for (int64_t i = part.begin(outputs); i < part.end(outputs); ++i)
        normalize(x + (p.only_last ? (i + 1) * p.count - 1 : i) * x_stride, qkv + i * qkv_stride, dim);
    part.meet();
    multiply<Single>(qkv, qkv_stride, static_cast<int>(outputs), dim, m.head, m.vocab, part,
                     [&](int row, int channel, Vec one, Vec two) {
                         float* out = p.logits + static_cast<int64_t>(row) * m.vocab + channel;
                         const int left = m.vocab - channel;
                         for (int i = 0; i < PANEL && i < left; ++i) out[i] = i < LANES ? one[i] : two[i - LANES];
                     });
}

// Threads of this thread's latest pass: for another number OpenMP would end some, and start them again for the next.
thread_local int team = 1;

template <class T>
void run(const Model& m, const Pass& p) {
    team = static_cast<int>(p.threads);
    static thread_local Pad<T> kept;
    Pad<T>& pad = kept;  // the caller's, for all threads
    pad.fit(static_cast<int>(p.batch * p.count), m);
#pragma omp parallel num_threads(static_cast<int>(p.threads))
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        forward<T>(m, p, {thread, threads}, pad);
    }
}

// Rows of logits are padded to whole vectors: with numbers that no sum and no search notices.
inline int whole(int size) { return (size + LANES - 1) / LANES * LANES; }

inline void pad_with(float* x, int size, float value) {
    for (int i = size; i < whole(size); ++i) x[i] = value;
}

float largest_of(const float* x, int size) {
    Vec best = load(x);
    for (int i = LANES; i < size; i += LANES) best = load(x + i) > best ? load(x + i) : best;
    return maximum(best);
}

int place_of_largest(const float* x, int size) {
    const float largest = largest_of(x, size);
    int place = 0;
    while (place < size - 1 && x[place] != largest) ++place;
    return place;
}

// to = e^(x - largest); returns its sum.
float exponentials(const float* x, float largest, float* to, int size) {
    Vec totals{};
    for (int i = 0; i < size; i += LANES) {
        const Vec value = exponential(load(x + i) - largest);
        store(to + i, value);
        totals += value;
    }
    return sum(totals);
}

// log p of one of the logits x (size); `space` holds as many, whole vectors.
float log_likelihood(const float* x, int size, int chosen, float* space) {
    std::memcpy(space, x, size * sizeof(float));
    pad_with(space, size, -std::numeric_limits<float>::infinity());
    const float largest = largest_of(space, size);
    float total = exponentials(space, largest, space, size);
    for (int i = size; i < whole(size); ++i) total -= space[i];
    return x[chosen] - largest - std::log(total);
}

// The likeliest with its noise that the filters keep, as filters.choose_without_sorting finds it.
int choose(const Choice& c, const float* scaled, const float* noise, float* noisy, float* weights) {
    const int size = static_cast<int>(c.vocab);
    const bool has_k = c.top_k > 0 && c.top_k < size, has_p = c.top_p < 1;
    const float never = -std::numeric_limits<float>::infinity(), largest = largest_of(scaled, size);
    const float least = c.min_p > 0 ? largest + std::log(c.min_p) : never;
    float total = 0;
    if (has_p) {
        float smallest = never;
        if (has_k) {
            std::memcpy(weights, scaled, size * sizeof(float));
            std::nth_element(weights, weights + c.top_k - 1, weights + size, std::greater<float>());
            smallest = weights[c.top_k - 1];
        }
        exponentials(scaled, largest, weights, size);
        Vec totals{};
        for (int i = 0; i < size; i += LANES) {
            const Vec kept = load(scaled + i) < smallest ? Vec{} : load(weights + i);
            store(weights + i, kept);
            totals += kept;
        }
        total = sum(totals);
    }
    for (int i = 0; i < size; ++i) noisy[i] = scaled[i] + noise[i];
    pad_with(noisy, size, never);
    for (int tries = 0; tries < size; ++tries) {
        const int drawn = place_of_largest(noisy, size);
        const float own = scaled[drawn];
        bool is_kept = own >= least;
        if (is_kept && has_k) {
            IntVec likelier{};
            for (int i = 0; i < size; i += LANES) likelier -= load(scaled + i) > own;
            int count = 0;
            for (int i = 0; i < LANES; ++i) count += likelier[i];
            is_kept = count < c.top_k;
        }
        if (is_kept && has_p) {
            Vec likelier{};
            for (int i = 0; i < size; i += LANES) likelier += load(scaled + i) > own ? load(weights + i) : Vec{};
            is_kept = sum(likelier) < c.top_p * total;
        }
        if (is_kept) return drawn;
        noisy[drawn] = never;
    }
    return place_of_largest(scaled, size);
}

}  // namespace

extern "C" {

int32_t lanes() { return LANES; }

int32_t has_brief() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

void run_pass(const Model* model, const Pass* pass) {
#ifdef __AVX512BF16__
    if (model->is_brief) return run<Brief>(*model, *pass);
#endif
    run<Single>(*model, *pass);
}

void run_choice(const Choice* choice) {
    const Choice& c = *choice;
    const int size = static_cast<int>(c.vocab);
    const int64_t rows = c.pictures * c.tokens;
    const int wanted = static_cast<int>(c.threads < rows ? c.threads : rows);
#pragma omp parallel num_threads(team > wanted ? team : wanted)
    {
        std::vector<float> scaled(whole(size)), noisy(whole(size)), weights(whole(size));
        pad_with(scaled.data(), size, LEAST);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            const float* conditional = c.conditional + row * size;
            const float* null = c.null ? c.null + row * size : nullptr;
            const float scale = c.scales[row % c.tokens];
            float* to = scaled.data();
            if (null && scale != 1) {
                for (int i = 0; i < size; ++i) to[i] = null[i] + scale * (conditional[i] - null[i]);
            } else {
                std::memcpy(to, conditional, size * sizeof(float));
            }
            if (c.temperature > 0 && c.temperature != 1)
                for (int i = 0; i < size; ++i) to[i] /= c.temperature;
            const float* noise = c.noise + row / c.tokens * c.noise_stride + row % c.tokens * size;
            const int drawn = c.temperature > 0 ? choose(c, scaled.data(), noise, noisy.data(), weights.data())
                                                : place_of_largest(scaled.data(), size);
            c.ids[row] = drawn;
            c.likelihoods[row] = log_likelihood(conditional, size, drawn, noisy.data());
            if (null) c.null_likelihoods[row] = log_likelihood(null, size, drawn, noisy.data());
        }
    }
}
}
