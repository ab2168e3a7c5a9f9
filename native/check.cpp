// Runs every op of a built library on small inputs, with each instruction set of this machine and 1 and 2 threads, and
// compares with formulas written out in double. For machines without Python, and for emulators:
//
//     quamba_cpu_check PATH/_quamba_cpu.so
//
// What the ops mean is said in src/quamba/kernels/reference/.
#include <algorithm>
#include <dlfcn.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "quamba_cpu.h"

namespace {

using Doubles = std::vector<double>;
using Floats = std::vector<float>;

// The library.

struct Library {
    decltype(&qb_abi) abi;
    decltype(&qb_size_of) size_of;
    decltype(&qb_instruction_sets) instruction_sets;
    decltype(&qb_use_instruction_set) use_instruction_set;
    decltype(&qb_set_threads) set_threads;
    decltype(&qb_run) run;
} library;

template <class Function>
bool find(void *handle, const char *name, Function &function) {
    function = reinterpret_cast<Function>(dlsym(handle, name));
    return function != nullptr;
}

bool open_library(const char *path) {
    void *handle = dlopen(path, RTLD_NOW);
    return handle && find(handle, "qb_abi", library.abi) && find(handle, "qb_size_of", library.size_of) &&
           find(handle, "qb_instruction_sets", library.instruction_sets) &&
           find(handle, "qb_use_instruction_set", library.use_instruction_set) &&
           find(handle, "qb_set_threads", library.set_threads) && find(handle, "qb_run", library.run);
}

template <class Args>
void run(QbKind kind, const Args &args) {
    const QbOp op = {kind, &args};
    library.run(&op, 1);
}

// Random numbers, the same everywhere.

uint64_t seed;

uint32_t random_bits() {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(seed >> 33) ^ static_cast<uint32_t>(seed >> 59);
}
/// Integers of [low, high].
int whole(int low, int high) { return low + static_cast<int>(random_bits() % static_cast<uint32_t>(high - low + 1)); }
double between(double low, double high) { return low + (high - low) * (random_bits() % 1000003) / 1000002.0; }
/// About normal, of standard deviation 1, exact as a float.
double normal() {
    double sum = 0;
    for (int i = 0; i < 6; ++i) sum += between(-1, 1);
    return static_cast<float>(sum * 0.70710678);
}

// Numbers as they are stored.

int64_t bytes_of(int dtype) { return dtype == QB_F32 ? 4 : dtype == QB_I8 ? 1 : 2; }

uint16_t to_f16(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const double a = std::fabs(x);
    if (std::isnan(x)) return 0x7e00;
    if (a >= 65520) return static_cast<uint16_t>(sign | 0x7c00);
    if (a < std::ldexp(1, -14))
        return static_cast<uint16_t>(sign | static_cast<int>(std::nearbyint(std::ldexp(a, 24))));
    const int e = std::ilogb(a);
    return static_cast<uint16_t>(sign | (((e + 14) << 10) + static_cast<int>(std::nearbyint(std::ldexp(a, 10 - e)))));
}
double from_f16(uint16_t h) {
    const int e = h >> 10 & 31, m = h & 1023;
    const double a = e == 31 ? (m ? NAN : INFINITY) : e ? std::ldexp(1024 + m, e - 25) : std::ldexp(m, -24);
    return h & 0x8000 ? -a : a;
}
uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (std::isnan(x)) return static_cast<uint16_t>(bits >> 16 | 64);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
double from_bf16(uint16_t h) {
    const uint32_t bits = static_cast<uint32_t>(h) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

/// Of codes: themselves.
void put(int dtype, char *p, double value) {
    const float x = static_cast<float>(value);
    if (dtype == QB_F32) std::memcpy(p, &x, 4);
    if (dtype == QB_I8) *p = static_cast<char>(static_cast<int8_t>(value));
    if (dtype != QB_BF16 && dtype != QB_F16) return;
    const uint16_t h = dtype == QB_F16 ? to_f16(x) : to_bf16(x);
    std::memcpy(p, &h, 2);
}
double get(int dtype, const char *p) {
    float x;
    uint16_t h;
    if (dtype == QB_I8) return static_cast<int8_t>(*p);
    if (dtype == QB_F32) return std::memcpy(&x, p, 4), x;
    std::memcpy(&h, p, 2);
    return dtype == QB_F16 ? from_f16(h) : from_bf16(h);
}
/// What is read back of a float that was stored.
double stored(int dtype, double value) {
    char p[4];
    return put(dtype, p, value), get(dtype, p);
}

/// A tensor (batch, tokens, channels), some bytes that nobody should write after each row.
struct Values {
    int dtype;
    int64_t batch, tokens, channels, stride;
    std::vector<char> bytes;
    Floats scale;  // of codes: one, or one a channel
    static constexpr char kPoison = 77;

    Values(int dtype_, int64_t batch_, int64_t tokens_, int64_t channels_, int64_t gap = 3)
        : dtype(dtype_),
          batch(batch_),
          tokens(tokens_),
          channels(channels_),
          stride(channels_ + gap),
          bytes(static_cast<size_t>(batch * tokens * stride * bytes_of(dtype)), kPoison) {}

    int64_t at(int64_t b, int64_t t, int64_t c) const { return ((b * tokens + t) * stride + c) * bytes_of(dtype); }
    char *point(int64_t b, int64_t t, int64_t c) { return bytes.data() + at(b, t, c); }
    double code(int64_t b, int64_t t, int64_t c) const { return get(dtype, bytes.data() + at(b, t, c)); }
    double step(int64_t c) const { return scale.empty() ? 1.0 : scale[scale.size() > 1 ? c : 0]; }
    double real(int64_t b, int64_t t, int64_t c) const { return code(b, t, c) * step(c); }

    /// Values of about this size, and one scale if they are codes.
    Values &fill(double size = 1.0, bool by_channel = false) {
        if (dtype == QB_I8) scales(size / 40, by_channel);
        for (int64_t b = 0; b < batch; ++b)
            for (int64_t t = 0; t < tokens; ++t)
                for (int64_t c = 0; c < channels; ++c)
                    put(dtype, point(b, t, c), dtype == QB_I8 ? whole(-128, 127) : size * normal());
        return *this;
    }
    Values &scales(double size, bool by_channel = false) {
        scale.resize(by_channel ? channels : 1);
        for (float &s : scale) s = static_cast<float>(between(0.5, 1.5) * size);
        return *this;
    }
    QbTensor tensor() const {
        return {const_cast<char *>(bytes.data()),
                scale.empty() ? nullptr : scale.data(),
                tokens * stride,
                stride,
                dtype,
                scale.size() > 1};
    }
    bool gaps_are_untouched() const {
        for (int64_t row = 0; row < batch * tokens; ++row)
            for (int64_t i = at(0, row, channels); i < at(0, row + 1, 0); ++i)
                if (bytes[static_cast<size_t>(i)] != kPoison) return false;
        return true;
    }
};

Floats some_floats(int64_t count, double low, double high) {
    Floats v(static_cast<size_t>(count));
    for (float &x : v) x = static_cast<float>(between(low, high));
    return v;
}
std::vector<uint8_t> some_mask(int64_t count) {
    std::vector<uint8_t> mask(static_cast<size_t>(count));
    for (uint8_t &m : mask) m = whole(0, 3) > 0;
    return mask;
}

// What is compared.

constexpr double kExact = -1;
std::string first_difference, case_name;
int64_t cases;

void begin(const std::string &name) {
    case_name = name;
    ++cases;
}
void fail(const std::string &what) {
    if (first_difference.empty()) first_difference = case_name + ": " + what;
}
std::string text(double x) {
    char s[40];
    std::snprintf(s, sizeof s, "%.9g", x);
    return s;
}
std::string text(int64_t x) { return std::to_string(x); }
const char *name_of(int dtype) {
    const char *names[] = {"float32", "bfloat16", "float16", "int8"};
    return names[dtype];
}

double code_of(float x, float scale, int rounding, int overflow) {
    const float exact = x / scale;
    double code = rounding == QB_HALF_EVEN ? std::nearbyint(exact) : std::round(exact);
    if (overflow == QB_SATURATE) return code < -128 ? -128 : code > 127 ? 127 : code;
    code = code < -2147483648.0 ? -2147483648.0 : code > 2147483647.0 ? 2147483647.0 : code;
    return static_cast<int8_t>(static_cast<int32_t>(code) & 255);
}

/// got: a code, or a float. slack: what float32 may lose of `want` before it is rounded to be stored.
bool is_near(int dtype, double got, double want, double scale, double slack, int rounding, int overflow) {
    if (dtype == QB_I8) {
        if (slack == kExact)
            return got == code_of(static_cast<float>(want), static_cast<float>(scale), rounding, overflow);
        const double steps = want / scale, clamped = std::fmin(std::fmax(steps, -128), 127);
        const double far = overflow == QB_SATURATE ? got - clamped : std::remainder(got - steps, 256);
        return std::fabs(far) <= 0.5 + slack / scale + 1e-6 * std::fabs(steps);
    }
    if (slack == kExact) return got == stored(dtype, want);
    const double digit = dtype == QB_F32 ? 6e-8 : dtype == QB_BF16 ? 0.00391 : 0.000489;
    return std::fabs(got - want) <= slack + digit * std::fabs(want) + (dtype == QB_F16 ? 3e-8 : 0);
}

void expect(const std::string &what, double got, double want, bool near) {
    if (!near) fail(what + " is " + text(got) + ", expected " + text(want));
}

/// want, slack [batch * tokens * channels]; slack empty: exact.
void expect(const char *what, const Values &got, const Doubles &want, const Doubles &slack = {},
            int rounding = QB_HALF_EVEN, int overflow = QB_SATURATE) {
    size_t i = 0;
    for (int64_t b = 0; b < got.batch; ++b)
        for (int64_t t = 0; t < got.tokens; ++t)
            for (int64_t c = 0; c < got.channels; ++c, ++i) {
                if (is_near(got.dtype, got.code(b, t, c), want[i], got.step(c), slack.empty() ? kExact : slack[i],
                            rounding, overflow))
                    continue;
                const std::string place = "[" + text(b) + ", " + text(t) + ", " + text(c) + "]";
                expect(what + place, got.code(b, t, c), want[i] / got.step(c), false);
            }
    if (!got.gaps_are_untouched()) fail(std::string(what) + " was written beyond the end of a row");
}

double silu(double x) { return x / (1 + std::exp(-x)); }
double softplus(double x) { return x > 20 ? x : std::log1p(std::exp(x)); }

// Matrix products.

/// Weights of a linear or of a table, [outputs, columns].
struct Weights {
    int64_t outputs, columns, groups, scale_rows;
    int bits, scale_dtype;
    std::vector<char> data, scale;
    Floats channel_scale;
    Doubles real;
    Floats row_unit;
    const void *scales() const { return scale.empty() ? nullptr : scale.data(); }
};

/// As "int4 group", with scales that are 1 to 16 times a power of two of their row.
Weights of_multiples(int64_t outputs, int64_t columns, int64_t groups) {
    Weights w = {outputs, columns, groups, outputs, 4, QB_F16, {}, {}, {}, {}, {}};
    w.scale.resize(static_cast<size_t>(outputs * groups * 2));
    w.data.assign(static_cast<size_t>(outputs * columns / 2), 0);
    for (int64_t o = 0; o < outputs; ++o) {
        w.row_unit.push_back(0.125f * static_cast<float>(whole(1, 2)));
        Doubles scales;
        for (int64_t g = 0; g < groups; ++g) {
            scales.push_back(whole(1, 16) * static_cast<double>(w.row_unit.back()));
            put(QB_F16, &w.scale[static_cast<size_t>(2 * (o * groups + g))], scales.back());
        }
        for (int64_t k = 0; k < columns; ++k) {
            const int code = whole(-8, 7);
            const int64_t i = o * columns + k;
            w.data[static_cast<size_t>(i / 2)] |= static_cast<char>((code & 15) << 4 * (i % 2));
            w.real.push_back(code * scales[static_cast<size_t>(k / (columns / groups))]);
        }
    }
    return w;
}

/// Scales are powers of two, or with two levels numbers of few digits. reach: of codes of 8 bits.
Weights quantized(int bits, int64_t outputs, int64_t columns, int64_t groups, bool by_row, bool two_levels,
                  int scale_dtype, int reach) {
    Weights w = {outputs, columns, groups, by_row ? outputs : 1, bits, scale_dtype, {}, {}, {}, {}, {}};
    w.scale.resize(static_cast<size_t>(w.scale_rows * groups * bytes_of(scale_dtype)));
    for (int64_t i = 0; i < w.scale_rows * groups; ++i)
        put(scale_dtype, &w.scale[static_cast<size_t>(i * bytes_of(scale_dtype))],
            two_levels ? whole(1, 300) / 16.0 : 0.25 * whole(1, 2));
    for (int64_t o = 0; two_levels && o < outputs; ++o)
        w.channel_scale.push_back(0.25f * static_cast<float>(whole(1, 2)));
    w.data.assign(static_cast<size_t>(outputs * columns * bits / 8), 0);
    for (int64_t o = 0; o < outputs; ++o)
        for (int64_t k = 0; k < columns; ++k) {
            const int code = bits == 4 ? whole(-8, 7) : whole(-reach, reach - 1);
            const int64_t i = o * columns + k, g = (by_row ? o * groups : 0) + k / (columns / groups);
            const double scale = get(scale_dtype, &w.scale[static_cast<size_t>(g * bytes_of(scale_dtype))]);
            if (bits == 8)
                w.data[static_cast<size_t>(i)] = static_cast<char>(code);
            else
                w.data[static_cast<size_t>(i / 2)] |= static_cast<char>((code & 15) << 4 * (i % 2));
            const double level = std::fmin(std::fmax(std::nearbyint(code * scale), -128), 127);
            w.real.push_back(two_levels ? level * static_cast<double>(w.channel_scale[static_cast<size_t>(o)])
                                        : code * scale);
        }
    return w;
}

Weights of_floats(int dtype, int64_t outputs, int64_t columns) {
    Weights w = {outputs, columns, 1, 1, static_cast<int>(8 * bytes_of(dtype)), dtype, {}, {}, {}, {}, {}};
    w.data.resize(static_cast<size_t>(outputs * columns * bytes_of(dtype)));
    for (int64_t i = 0; i < outputs * columns; ++i) {
        w.real.push_back(whole(-128, 127) / 32.0);
        put(dtype, &w.data[static_cast<size_t>(i * bytes_of(dtype))], w.real.back());
    }
    return w;
}

/// exact: inputs with which all that is rounded on the way stays as it is.
void check_product(const std::string &name, const Weights &w, int x_dtype, int y_dtype, int64_t rows, bool exact) {
    begin("linear " + name + " " + name_of(x_dtype) + " -> " + name_of(y_dtype) + ", rows " + text(rows) +
          ", outputs " + text(w.outputs) + ", columns " + text(w.columns) + (exact ? ", exact" : ""));
    Values x(x_dtype, 1, rows, w.columns), y(y_dtype, 1, rows, w.outputs);
    const bool floats = w.scale.empty(), codes = x_dtype == QB_I8;
    x.fill();
    if (!codes && exact)  // with 16256 / 1024 the largest number, the integers that these become are n
        for (int64_t t = 0; t < rows; ++t)
            for (int64_t k = 0; k < w.columns; ++k) {
                const bool largest = k % (w.columns / w.groups) % 128 == 0;
                put(x_dtype, x.point(0, t, k), (largest ? 16256 * (2 * whole(0, 1) - 1) : whole(-255, 255)) / 1024.0);
            }
    const float x_scale = 0.5f;
    const bool scaled = codes && rows % 2;
    Floats bias;
    for (int64_t o = 0; rows != 3 && o < w.outputs; ++o) bias.push_back(static_cast<float>(whole(-50, 50)));
    if (y_dtype == QB_I8) y.scale = Floats(1, codes ? 4096.0f : exact ? 8.0f : 3.0f);
    const QbTensor of_x = {x.bytes.data(), nullptr, 0, x.stride, x_dtype, 0};
    run(QB_LINEAR, QbLinear{of_x, y.tensor(), rows, w.columns, w.outputs, w.groups, w.scale_rows, w.data.data(),
                            w.scales(), w.channel_scale.empty() ? nullptr : w.channel_scale.data(),
                            w.row_unit.empty() ? nullptr : w.row_unit.data(),
                            bias.empty() ? nullptr : bias.data(), scaled ? &x_scale : nullptr, w.bits, w.scale_dtype});
    Doubles want, slack;
    for (int64_t t = 0; t < rows; ++t)
        for (int64_t o = 0; o < w.outputs; ++o) {
            double sum = 0, all = 0, squares = 0, reach = 0;
            for (int64_t k = 0; k < w.columns; ++k) {
                const double v = x.code(0, t, k) * (scaled ? 0.5 : 1),
                             by = w.real[static_cast<size_t>(o * w.columns + k)];
                sum += v * by;
                all += std::fabs(v * by);
                squares += by * by;
                reach = std::fmax(reach, std::fabs(v));
            }
            want.push_back(sum + (bias.empty() ? 0.0 : bias[static_cast<size_t>(o)]));
            // Six times the deviation of what is lost where inputs become integers.
            slack.push_back(2e-6 * all + (floats ? 0 : 2 * std::sqrt(squares) * reach / 16256));
        }
    expect("y", y, want, exact ? Doubles() : slack);
}

void check_linear() {
    struct Format {
        const char *name;
        int bits;
        int64_t columns, groups;
        bool by_row, two_levels;
        int scale_dtype;
    };
    const Format formats[] = {
        {"int8 tensor", 8, 203, 1, false, false, QB_F32},   {"int8 channel", 8, 130, 1, true, false, QB_F32},
        {"int8 channel", 8, 256, 1, true, false, QB_F16},   {"int8 group", 8, 256, 4, true, false, QB_F16},
        {"int8 group", 8, 200, 5, true, false, QB_F32},     {"int4 group", 4, 384, 3, true, false, QB_F16},
        {"int4 group", 4, 256, 8, true, false, QB_F32},     {"int4 group", 4, 260, 5, true, false, QB_F16},
        {"int4 channel", 4, 194, 1, true, false, QB_F32},   {"int4 tensor", 4, 30, 1, false, false, QB_F32},
        {"int4 two levels", 4, 384, 3, true, true, QB_F16}, {"int4 two levels", 4, 152, 1, true, true, QB_F32},
    };
    const int64_t all_rows[] = {1, 3, 5, 13, 40};
    const int y_dtypes[] = {QB_F32, QB_BF16, QB_I8, QB_F16};
    int next = 0;
    for (const Format &f : formats)
        for (int64_t rows : all_rows)
            for (int x_dtype : {QB_I8, QB_F32, QB_F16, QB_BF16}) {
                const int64_t outputs = next % 2 ? 37 : 114;
                const int y_dtype = y_dtypes[next++ % 4];
                for (int dtype : {static_cast<int>(QB_F32), y_dtype}) {
                    const int reach = x_dtype == QB_I8 ? 128 : 30;
                    check_product(
                        f.name,
                        quantized(f.bits, outputs, f.columns, f.groups, f.by_row, f.two_levels, f.scale_dtype, reach),
                        x_dtype, dtype, rows, true);
                }
                if (x_dtype == QB_I8) continue;
                check_product(
                    f.name, quantized(f.bits, outputs, f.columns, f.groups, f.by_row, f.two_levels, f.scale_dtype, 128),
                    x_dtype, y_dtype, rows, false);
            }
    for (int64_t rows : all_rows)
        for (int64_t outputs : {37, 114})
            for (int y_dtype : y_dtypes) {
                check_product("int4 multiples", of_multiples(outputs, 384, 3), QB_I8, y_dtype, rows, true);
                check_product("int4 multiples", of_multiples(outputs, 152, 1), QB_I8, y_dtype, rows, true);
                check_product("int4 multiples", of_multiples(outputs, 384, 3), QB_F32, y_dtype, rows, true);
            }
    for (int w_dtype : {QB_F32, QB_BF16, QB_F16})
        for (int x_dtype : {QB_F32, QB_BF16, QB_F16})
            for (int64_t rows : all_rows)
                check_product(name_of(w_dtype), of_floats(w_dtype, 37, 101 + 16 * rows), x_dtype, y_dtypes[next++ % 4],
                              rows, false);
}

void check_embedding() {
    const int64_t ids[] = {3, 0, 10, 3, 7}, rows = 5;
    const Weights tables[] = {quantized(8, 11, 53, 1, true, false, QB_F32, 128),
                              quantized(8, 11, 53, 1, false, false, QB_F16, 128),
                              quantized(8, 11, 96, 3, true, false, QB_F16, 128),
                              quantized(4, 11, 50, 1, true, false, QB_F32, 8),
                              quantized(4, 11, 96, 3, true, false, QB_F16, 8),
                              of_floats(QB_F32, 11, 53),
                              of_floats(QB_BF16, 11, 53),
                              of_floats(QB_F16, 11, 53)};
    for (const Weights &w : tables)
        for (int dtype : {QB_F32, QB_BF16, QB_F16}) {
            begin("embedding of " + text(int64_t{w.bits}) + " bits, " + text(w.columns) + " columns -> " +
                  name_of(dtype));
            Values y(dtype, 1, rows, w.columns);
            run(QB_EMBEDDING, QbEmbedding{ids, y.tensor(), rows, w.columns, w.groups, w.scale_rows, w.data.data(),
                                          w.scales(), w.bits, w.scale_dtype});
            Doubles want;
            for (int64_t id : ids)
                for (int64_t k = 0; k < w.columns; ++k) want.push_back(w.real[static_cast<size_t>(id * w.columns + k)]);
            expect("y", y, want);
        }
}

// Norms.

void check_add_norm_of(int x_dtype, int residual_dtype, int sum_dtype, int y_dtype, int64_t columns, bool center) {
    const bool given = residual_dtype >= 0;
    begin("add_norm " + std::string(name_of(x_dtype)) + (given ? std::string(" + ") + name_of(residual_dtype) : "") +
          " -> " + name_of(sum_dtype) + ", " + name_of(y_dtype) + ", columns " + text(columns) +
          (center ? ", centred" : ""));
    const int64_t rows = 5;
    Values x(x_dtype, 1, rows, columns), residual(given ? residual_dtype : QB_F32, 1, rows, columns),
        sum(sum_dtype, 1, rows, columns), y(y_dtype, 1, rows, columns);
    x.fill(1.0);
    residual.fill(3.0);
    if (y_dtype == QB_I8) y.scales(0.03);
    const Floats weight = some_floats(columns, 0.5, 1.5), bias = some_floats(columns, -1, 1);
    const float eps = 1e-5f;
    run(QB_ADD_NORM, QbAddNorm{x.tensor(), given ? residual.tensor() : QbTensor{}, sum.tensor(), y.tensor(), rows,
                               columns, weight.data(), center ? bias.data() : nullptr, eps, center});
    Doubles sums, want;
    for (int64_t t = 0; t < rows; ++t) {
        Doubles v;
        double mean = 0, square = 0;
        for (int64_t c = 0; c < columns; ++c) {
            double s = static_cast<float>(x.real(0, t, c));
            if (given) {
                s = static_cast<float>(stored(residual_dtype, s)) + static_cast<float>(residual.real(0, t, c));
                s = stored(residual_dtype, static_cast<float>(s));
            }
            s = stored(sum_dtype, s);
            sums.push_back(s);
            v.push_back(s);
            mean += s / static_cast<double>(columns);
        }
        for (double &s : v) {
            s -= center ? mean : 0;
            square += s * s / static_cast<double>(columns);
        }
        for (size_t c = 0; c < v.size(); ++c)
            want.push_back(v[c] / std::sqrt(square + static_cast<double>(eps)) * static_cast<double>(weight[c]) +
                           (center ? static_cast<double>(bias[c]) : 0));
    }
    expect("sum", sum, sums);
    expect("y", y, want, Doubles(want.size(), 4e-6));
}

void check_add_norm() {
    for (int64_t columns : {1, 7, 48, 133, 520})
        for (int y_dtype : {QB_F32, QB_BF16, QB_F16, QB_I8}) {
            const bool center = columns % 2;
            check_add_norm_of(QB_F32, QB_F32, QB_F32, y_dtype, columns, center);
            check_add_norm_of(QB_BF16, QB_F32, QB_F32, y_dtype, columns, center);
            check_add_norm_of(QB_F32, QB_BF16, QB_BF16, y_dtype, columns, center);
            check_add_norm_of(QB_F16, QB_F16, QB_F16, y_dtype, columns, center);
            check_add_norm_of(QB_F32, -1, QB_F16, y_dtype, columns, center);
            check_add_norm_of(QB_I8, -1, QB_F32, y_dtype, columns, center);
        }
}

/// Sylvester's matrix has (-1)^(number of bits that i and j share) at i, j.
Doubles rotated(const Doubles &v, int64_t order, const Floats &signs, bool transposed) {
    const int64_t n = static_cast<int64_t>(v.size()), size = n / order;
    Doubles fast(v.size()), out(v.size());
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < size; ++j) {
            const bool odd = __builtin_parityll(static_cast<uint64_t>(i % size & j));
            fast[static_cast<size_t>(i)] += (odd ? -1 : 1) * v[static_cast<size_t>(i / size * size + j)];
        }
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < order; ++j) {
            const int64_t at = transposed ? j * order + i / size : i / size * order + j;
            out[static_cast<size_t>(i)] +=
                static_cast<double>(signs[static_cast<size_t>(at)]) * fast[static_cast<size_t>(j * size + i % size)];
        }
    for (double &x : out) x /= std::sqrt(static_cast<double>(n));
    return out;
}

void check_gated_norm_of(int64_t columns, int64_t order, int64_t group, int rotate, int y_dtype, int z_dtype,
                         int out_dtype, bool norm_first, int rounding, int overflow) {
    const bool gated = z_dtype >= 0;
    begin("gated_norm " + std::string(name_of(y_dtype)) + (gated ? std::string(" * ") + name_of(z_dtype) : "") +
          " -> " + name_of(out_dtype) + ", columns " + text(columns) + ", groups of " + text(group) +
          ", Paley factor " + text(order) + ", rotation " + text(int64_t{rotate}) + (norm_first ? ", norm first" : ""));
    const int64_t rows = 3;
    Values y(y_dtype, 1, rows, columns), z(gated ? z_dtype : QB_F32, 1, rows, columns),
        out(out_dtype, 1, rows, columns);
    y.fill(2.0);
    z.fill(6.0);
    // Small ones, so that wrapping has something to do.
    if (out_dtype == QB_I8) out.scales(overflow == QB_WRAP ? 0.006 : 0.02);
    const Floats weight = some_floats(columns, 0.5, 1.5);
    Floats signs(1, 1.0f);
    for (int64_t i = 1; i < order * order; ++i) signs.push_back(whole(0, 1) ? 1.0f : -1.0f);
    const float eps = 1e-5f;
    run(QB_GATED_NORM,
        QbGatedNorm{y.tensor(), gated ? z.tensor() : QbTensor{}, out.tensor(), rows, columns, group, order,
                    order == 12 ? nullptr : weight.data(), signs.data(), eps, norm_first, rotate, rounding, overflow});
    Doubles want, slack;
    for (int64_t t = 0; t < rows; ++t) {
        Doubles v;
        for (int64_t c = 0; c < columns; ++c)
            v.push_back(y.real(0, t, c) * (gated && !norm_first ? silu(z.real(0, t, c)) : 1));
        for (int64_t first = 0; gated && first < columns; first += group) {
            double square = 0;
            for (int64_t c = first; c < first + group; ++c)
                square += v[static_cast<size_t>(c)] * v[static_cast<size_t>(c)] / static_cast<double>(group);
            for (int64_t c = first; c < first + group; ++c) {
                double &x = v[static_cast<size_t>(c)];
                x /= std::sqrt(square + static_cast<double>(eps));
                x *= order == 12 ? 1 : static_cast<double>(weight[static_cast<size_t>(c)]);
                x *= norm_first ? silu(z.real(0, t, c)) : 1;
            }
        }
        double size = 0;
        for (double x : v) size += std::fabs(x) / static_cast<double>(columns);
        if (rotate) v = rotated(v, order, signs, rotate == 2);
        for (double x : v) {
            want.push_back(x);
            slack.push_back(3e-6 * std::fabs(x) + (rotate ? 3e-6 * size * static_cast<double>(order) : 0));
        }
    }
    expect("out", out, want, slack, rounding, overflow);
}

void check_gated_norm() {
    struct Size {
        int64_t columns, order, group;
    };
    const Size sizes[] = {{2, 1, 2},       {4, 1, 4},       {8, 1, 8},     {16, 1, 16},     {64, 1, 32},  {128, 1, 128},
                          {1024, 1, 64},   {2048, 1, 2048}, {12, 12, 12},  {24, 12, 12},    {96, 12, 96}, {192, 12, 64},
                          {1536, 12, 768}, {20, 20, 20},    {160, 20, 40}, {1280, 20, 1280}};
    const int out_dtypes[] = {QB_F32, QB_I8, QB_BF16, QB_I8, QB_F16};
    int next = 0;
    for (const Size &s : sizes)
        for (int z_dtype : {static_cast<int>(QB_F32), static_cast<int>(QB_I8), static_cast<int>(QB_BF16), -1})
            for (int rotate : {1, 2}) {
                const int out_dtype = out_dtypes[next++ % 5], y_dtype = next % 3 ? QB_F32 : QB_F16;
                check_gated_norm_of(s.columns, s.order, s.group, rotate, y_dtype, z_dtype, out_dtype, next % 4 == 1,
                                    next % 2 ? QB_HALF_AWAY : QB_HALF_EVEN, next % 7 < 3 ? QB_WRAP : QB_SATURATE);
            }
    for (int64_t columns : {60, 600})
        for (int z_dtype : {QB_F32, QB_I8, QB_F16})
            for (int norm_first : {0, 1})
                check_gated_norm_of(columns, 1, columns / 3, 0, QB_F32, z_dtype, QB_F32, norm_first, 0, 0);
}

// The convolution.

void check_conv_of(int x_dtype, int y_dtype, int64_t length, int64_t channels, int64_t width, bool with_state,
                   bool with_mask) {
    begin("conv " + std::string(name_of(x_dtype)) + " -> " + name_of(y_dtype) + ", length " + text(length) +
          ", channels " + text(channels) + ", " + text(width) + " taps" + (with_state ? ", state" : "") +
          (with_mask ? ", mask" : ""));
    const int64_t batch = 2;
    const bool codes = x_dtype == QB_I8;
    const int rounding = length % 2 ? QB_HALF_AWAY : QB_HALF_EVEN;
    Values x(x_dtype, batch, length, channels), state(x_dtype, batch, width - 1, channels),
        y(y_dtype, batch, length, channels);
    x.fill();
    state.fill();
    x.scale.clear();
    state.scale.clear();
    if (y_dtype == QB_I8) y.scales(0.02, width == 4);
    Floats weight = some_floats(width * channels, -1, 1), scale;
    const Floats bias = some_floats(channels, -1, 1);
    for (float &w : weight) w = codes ? std::round(127 * w) : w;
    if (codes) scale = some_floats(width == 3 ? 1 : channels, 0.0001, 0.0002);
    const std::vector<uint8_t> mask = some_mask(batch * length);
    const auto input = [&](int64_t b, int64_t t, int64_t c) {
        if (t < 0) return with_state ? state.code(b, width - 1 + t, c) : 0.0;
        return with_mask && !mask[static_cast<size_t>(b * length + t)] ? 0.0 : x.code(b, t, c);
    };
    Doubles want, slack, kept;
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t t = 0; t < length; ++t)
            for (int64_t c = 0; c < channels; ++c) {
                const double by = codes ? scale[scale.size() > 1 ? static_cast<size_t>(c) : 0] : 1.0;
                const double add = width == 2 ? 0.0 : bias[static_cast<size_t>(c)];
                double sum = add, all = std::fabs(add);
                for (int64_t w = 0; w < width; ++w) {
                    const double term = by * input(b, t - width + 1 + w, c) *
                                        static_cast<double>(weight[static_cast<size_t>(w * channels + c)]);
                    sum += term;
                    all += std::fabs(term);
                }
                want.push_back(with_mask && !mask[static_cast<size_t>(b * length + t)] ? 0.0 : silu(sum));
                slack.push_back(1e-6 * all);
            }
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t t = length - width + 1; t < length; ++t)
            for (int64_t c = 0; c < channels; ++c) kept.push_back(input(b, t, c));
    run(QB_CONV, QbConv{x.tensor(), y.tensor(), with_state ? state.tensor() : QbTensor{}, batch, length, channels,
                        width, weight.data(), width == 2 ? nullptr : bias.data(), codes ? scale.data() : nullptr,
                        with_mask ? mask.data() : nullptr, scale.size() > 1, rounding});
    expect("y", y, want, slack, rounding);
    if (with_state) expect("state", state, kept);
}

void check_conv() {
    const int dtypes[] = {QB_F32, QB_BF16, QB_F16, QB_I8};
    int next = 0;
    for (int x_dtype : dtypes)
        for (int y_dtype : dtypes)
            for (int64_t length : {1, 2, 5, 70, 131})
                for (int with : {0, 1, 2, 3}) {
                    const int64_t width = with == 1 ? 4 : 2 + next % 3, channels = next++ % 2 ? 37 : 96;
                    check_conv_of(x_dtype, y_dtype, length, channels, width, with & 1, with & 2);
                }
}

// Scans.

/// A state (batch, channels, d_state) of floats, or of codes with scales in one of the arrangements.
struct State {
    Values values;
    Floats scale;
    std::vector<int32_t> group;
    int64_t rows, columns;

    State(int dtype, int64_t batch, int64_t channels, int64_t d_state, int arrangement)
        : values(dtype, batch, channels, d_state, 0), rows(0), columns(0) {
        values.fill(0.5);
        values.scale.clear();
        if (dtype != QB_I8) return;
        const int64_t groups = 3;
        rows = arrangement < 2 ? groups : arrangement == 2 ? 1 : channels;
        columns = arrangement % 2 ? d_state : 1;
        scale = some_floats(rows * columns, 0.02, 0.04);
        for (int64_t c = 0; rows == groups && c < channels; ++c) group.push_back(whole(0, 2));
    }
    double step(int64_t channel, int64_t n) const {
        if (scale.empty()) return 1;
        const int64_t row = !group.empty() ? group[static_cast<size_t>(channel)] : rows > 1 ? channel : 0;
        return scale[static_cast<size_t>(row * columns + (columns > 1 ? n : 0))];
    }
    QbState described() {
        return {values.bytes.data(),
                scale.empty() ? nullptr : scale.data(),
                group.empty() ? nullptr : group.data(),
                rows,
                columns,
                values.dtype,
                0};
    }
    void expect_near(const Doubles &want, const Doubles &slack) const {
        size_t i = 0;
        for (int64_t b = 0; b < values.batch; ++b)
            for (int64_t c = 0; c < values.tokens; ++c)
                for (int64_t n = 0; n < values.channels; ++n, ++i) {
                    const std::string place = "state[" + text(b) + ", " + text(c) + ", " + text(n) + "]";
                    const double got = values.code(b, c, n), by = step(c, n);
                    expect(place, got, want[i] / by,
                           is_near(values.dtype, got, want[i], by, slack[i], QB_HALF_EVEN, QB_SATURATE));
                }
    }
};

/// The states of one channel walk along the tokens; beside each number the sum of what was added, all positive.
struct Walk {
    Doubles h, all;
    void advance(double decay, double input, const Doubles &B) {
        for (size_t n = 0; n < h.size(); ++n) {
            h[n] = decay * h[n] + input * B[n];
            all[n] = decay * all[n] + std::fabs(input * B[n]);
        }
    }
};
Walk start_of(const State *state, int64_t b, int64_t channel, int64_t d_state) {
    Walk walk;
    for (int64_t n = 0; n < d_state; ++n) {
        walk.h.push_back(state ? state->values.code(b, channel, n) * state->step(channel, n) : 0.0);
        walk.all.push_back(std::fabs(walk.h.back()));
    }
    return walk;
}
Doubles row_of(const Values &v, int64_t b, int64_t t, int64_t first, int64_t count) {
    Doubles row;
    for (int64_t n = first; n < first + count; ++n) row.push_back(v.real(b, t, n));
    return row;
}

constexpr double kScanSlack = 1e-5;  // of the sum of all terms' sizes
// Of a column's largest, where numbers may become integers of 16 bits to be multiplied with codes: half steps (1.5e-5)
// of up to 48 tokens, of either sign.
constexpr double kSplitSlack = 1.2e-4;

struct ScanCase {
    int64_t length;
    int dtype, y_dtype, state_dtype;  // state_dtype -1: no state
    int arrangement;
    bool mask;
    std::string name() const {
        return std::string(name_of(dtype)) + " -> " + name_of(y_dtype) + ", length " + text(length) + ", state " +
               (state_dtype < 0 ? "none" : name_of(state_dtype)) +
               (state_dtype == QB_I8 ? " (" + text(int64_t{arrangement}) + ")" : "") + (mask ? ", mask" : "");
    }
};

void check_ssd_of(const ScanCase &s, int64_t headdim, int64_t d_state) {
    const int64_t batch = 2, heads = 4, groups = 2, channels = heads * headdim;
    begin("ssd " + s.name() + ", headdim " + text(headdim) + ", d_state " + text(d_state));
    const auto split_slack = [&](const Walk &walk) {
        return s.dtype == QB_I8 ? kSplitSlack * *std::max_element(walk.all.begin(), walk.all.end()) : 0.0;
    };
    Values x(s.dtype, batch, s.length, channels), dt(s.dtype == QB_I8 ? QB_F32 : s.dtype, batch, s.length, heads),
        B(s.dtype, batch, s.length, groups * d_state), C(s.dtype, batch, s.length, groups * d_state),
        y(s.y_dtype, batch, s.length, channels);
    x.fill(1.0, true);
    dt.fill(2.0);
    put(dt.dtype, dt.point(0, 0, 1), 30.0);
    put(dt.dtype, dt.point(1, 0, 2), -30.0);
    B.fill();
    C.fill();
    State state(s.state_dtype < 0 ? QB_F32 : s.state_dtype, batch, channels, d_state, s.arrangement);
    const bool given = s.state_dtype >= 0, limited = s.length % 2;
    const Floats A = some_floats(heads, -4, -0.01), D = some_floats(channels, -1, 1),
                 dt_bias = some_floats(heads, -5, 1);
    const std::vector<uint8_t> mask = some_mask(batch * s.length);
    const float low = limited ? 0.01f : 0.0f, high = limited ? 2.0f : INFINITY;
    Doubles want(static_cast<size_t>(batch * s.length * channels)), slack(want.size()), left, left_slack;
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t c = 0; c < channels; ++c) {
            const int64_t head = c / headdim, first = head / (heads / groups) * d_state;
            Walk walk = start_of(given ? &state : nullptr, b, c, d_state);
            for (int64_t t = 0; t < s.length; ++t) {
                const bool kept = !s.mask || mask[static_cast<size_t>(b * s.length + t)];
                double delta = softplus(dt.real(b, t, head) + static_cast<double>(dt_bias[static_cast<size_t>(head)]));
                delta = kept ? std::fmin(std::fmax(delta, static_cast<double>(low)), static_cast<double>(high)) : 0;
                walk.advance(std::exp(delta * static_cast<double>(A[static_cast<size_t>(head)])),
                             delta * x.real(b, t, c), row_of(B, b, t, first, d_state));
                const double direct = x.real(b, t, c) * static_cast<double>(D[static_cast<size_t>(c)]);
                const double split = split_slack(walk);
                double sum = direct, all = kScanSlack * std::fabs(direct);
                for (int64_t n = 0; n < d_state; ++n) {
                    sum += walk.h[static_cast<size_t>(n)] * C.real(b, t, first + n);
                    all += (kScanSlack * walk.all[static_cast<size_t>(n)] + split) * std::fabs(C.real(b, t, first + n));
                }
                const size_t at = static_cast<size_t>((b * s.length + t) * channels + c);
                want[at] = sum;
                slack[at] = all;
            }
            left.insert(left.end(), walk.h.begin(), walk.h.end());
            for (double a : walk.all) left_slack.push_back(kScanSlack * a + split_slack(walk));
        }
    run(QB_SSD, QbSsd{x.tensor(), dt.tensor(), B.tensor(), C.tensor(), y.tensor(),
                      given ? state.described() : QbState{}, batch, s.length, heads, headdim, groups, d_state, A.data(),
                      D.data(), dt_bias.data(), s.mask ? mask.data() : nullptr, low, high});
    expect("y", y, want, slack);
    if (given) state.expect_near(left, left_slack);
}

void check_selective_scan_of(const ScanCase &s, int64_t channels, int64_t d_state, bool gated) {
    const int64_t batch = 2;
    begin("selective_scan " + s.name() + ", channels " + text(channels) + ", d_state " + text(d_state) +
          (gated ? ", gated" : ""));
    Values u(s.dtype, batch, s.length, channels), dt(s.dtype == QB_I8 ? QB_F32 : s.dtype, batch, s.length, channels),
        z(s.dtype, batch, s.length, channels), B(s.dtype, batch, s.length, d_state),
        C(s.dtype, batch, s.length, d_state), y(s.y_dtype, batch, s.length, channels);
    u.fill(1.0, true);
    dt.fill(2.0);
    put(dt.dtype, dt.point(0, 0, 1), 30.0);
    put(dt.dtype, dt.point(1, 0, 2), -30.0);
    z.fill(4.0);
    B.fill();
    C.fill();
    State state(s.state_dtype < 0 ? QB_F32 : s.state_dtype, batch, channels, d_state, s.arrangement);
    const bool given = s.state_dtype >= 0;
    const Floats A = some_floats(channels * d_state, -4, -0.01), D = some_floats(channels, -1, 1),
                 dt_bias = some_floats(channels, -5, 1);
    const std::vector<uint8_t> mask = some_mask(batch * s.length);
    Doubles want(static_cast<size_t>(batch * s.length * channels)), slack(want.size()), left, left_slack;
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t c = 0; c < channels; ++c) {
            Walk walk = start_of(given ? &state : nullptr, b, c, d_state);
            for (int64_t t = 0; t < s.length; ++t) {
                const bool kept = !s.mask || mask[static_cast<size_t>(b * s.length + t)];
                const double input = u.real(b, t, c);
                const double delta =
                    kept ? softplus(dt.real(b, t, c) + static_cast<double>(dt_bias[static_cast<size_t>(c)])) : 0;
                double sum = input * static_cast<double>(D[static_cast<size_t>(c)]), all = std::fabs(sum);
                for (int64_t n = 0; n < d_state; ++n) {
                    double &h = walk.h[static_cast<size_t>(n)], &of_all = walk.all[static_cast<size_t>(n)];
                    const double decay = std::exp(delta * static_cast<double>(A[static_cast<size_t>(c * d_state + n)]));
                    const double driven = delta * input * B.real(b, t, n);
                    h = decay * h + driven;
                    of_all = decay * of_all + std::fabs(driven);
                    sum += h * C.real(b, t, n);
                    all += of_all * std::fabs(C.real(b, t, n));
                }
                const double gate = gated ? silu(z.real(b, t, c)) : 1;
                const size_t at = static_cast<size_t>((b * s.length + t) * channels + c);
                want[at] = sum * gate;
                slack[at] = kScanSlack * all * std::fabs(gate);
            }
            left.insert(left.end(), walk.h.begin(), walk.h.end());
            for (double a : walk.all) left_slack.push_back(kScanSlack * a);
        }
    run(QB_SELECTIVE_SCAN,
        QbSelectiveScan{u.tensor(), dt.tensor(), gated ? z.tensor() : QbTensor{}, B.tensor(), C.tensor(), y.tensor(),
                        given ? state.described() : QbState{}, batch, s.length, channels, d_state, A.data(), D.data(),
                        dt_bias.data(), s.mask ? mask.data() : nullptr});
    expect("y", y, want, slack);
    if (given) state.expect_near(left, left_slack);
}

/// Prompts and single tokens, in turn over formats.
template <class Check>
void scan_cases(const Check &check) {
    const int dtypes[] = {QB_F32, QB_I8, QB_BF16, QB_F16}, outputs[] = {QB_F32, QB_F16, QB_BF16};
    int next = 0;
    for (int64_t length : {1, 3, 50, 113})
        for (int state_dtype : {-1, static_cast<int>(QB_F32), static_cast<int>(QB_F16), static_cast<int>(QB_I8)})
            for (int mask : {0, 1})
                for (int arrangement = 0; arrangement < (state_dtype == QB_I8 ? 4 : 1); ++arrangement, ++next)
                    check(ScanCase{length, dtypes[next % 4], outputs[next % 3], state_dtype, arrangement, mask == 1});
}

void check_ssd() {
    scan_cases([](const ScanCase &s) {
        check_ssd_of(s, 5, 7);
        check_ssd_of(s, 24, 16);
        if (s.length < 100) check_ssd_of(s, 64, 128);
    });
}

void check_selective_scan() {
    scan_cases([](const ScanCase &s) {
        check_selective_scan_of(s, 37, 16, true);
        check_selective_scan_of(s, 300, s.arrangement % 2 ? 32 : 8, s.mask);
        check_selective_scan_of(s, 70, 5, !s.mask);
    });
}

void check_quantize() {
    const float special[] = {0.5f,   1.5f,   2.5f,   0.49999997f, 126.5f, 127.5f, 128.5f,
                             129.0f, 200.0f, 300.5f, 1e6f,        3e9f,   1e20f};
    for (int x_dtype : {QB_F32, QB_BF16, QB_F16})
        for (int rounding : {QB_HALF_EVEN, QB_HALF_AWAY})
            for (int overflow : {QB_SATURATE, QB_WRAP})
                for (int64_t columns : {37, 2100})
                    for (int by_channel : {0, 1}) {
                        if (x_dtype == QB_F16 && overflow == QB_WRAP && by_channel) continue;  // infinity has no code
                        begin("quantize " + std::string(name_of(x_dtype)) + ", rounding " + text(int64_t{rounding}) +
                              ", overflow " + text(int64_t{overflow}) + ", columns " + text(columns) +
                              (by_channel ? ", scales by channel" : ""));
                        Values x(x_dtype, 1, 3, columns), y(QB_I8, 1, 3, columns);
                        x.fill(60.0);
                        y.scales(0.7, by_channel);
                        if (!by_channel) y.scale[0] = 1.0f;
                        for (int64_t i = 0; i < 26; ++i) {
                            const double value = (i % 2 ? -1 : 1) * static_cast<double>(special[i / 2]) * y.step(i + 5);
                            put(x_dtype, x.point(0, 1, i + 5),
                                x_dtype == QB_F16 ? std::fmax(std::fmin(value, 6e4), -6e4) : value);
                        }
                        run(QB_QUANTIZE, QbQuantize{x.tensor(), y.tensor(), 3, columns, rounding, overflow});
                        Doubles want;
                        for (int64_t t = 0; t < 3; ++t)
                            for (int64_t c = 0; c < columns; ++c) want.push_back(x.real(0, t, c));
                        expect("y", y, want, {}, rounding, overflow);
                    }
}

/// Whether all was as it should be.
bool check_sizes() {
    const int64_t sizes[] = {sizeof(QbLinear), sizeof(QbEmbedding), sizeof(QbAddNorm),       sizeof(QbGatedNorm),
                             sizeof(QbConv),   sizeof(QbSsd),       sizeof(QbSelectiveScan), sizeof(QbQuantize)};
    for (int64_t kind = 0; kind < QB_KINDS; ++kind)
        if (library.size_of(kind) != sizes[kind]) return false;
    return library.abi() == QB_ABI;
}

bool check_set(const std::string &set) {
    struct Op {
        const char *name;
        void (*check)();
    };
    const Op ops[] = {{"linear", check_linear},
                      {"embedding", check_embedding},
                      {"add_norm", check_add_norm},
                      {"gated_norm", check_gated_norm},
                      {"conv", check_conv},
                      {"ssd", check_ssd},
                      {"selective_scan", check_selective_scan},
                      {"quantize", check_quantize}};
    if (library.use_instruction_set(set.c_str())) return false;
    bool all = true;
    for (const Op &op : ops) {
        cases = 0;
        std::string found;
        for (int threads : {1, 2}) {
            library.set_threads(threads);
            seed = 1;
            first_difference.clear();
            op.check();
            if (found.empty() && !first_difference.empty())
                found = text(int64_t{threads}) + (threads == 1 ? " thread, " : " threads, ") + first_difference;
        }
        if (found.empty())
            std::printf("%-10s  %-14s  ok    %d cases\n", set.c_str(), op.name, static_cast<int>(cases));
        else
            std::printf("%-10s  %-14s  FAIL  %s\n", set.c_str(), op.name, found.c_str());
        std::fflush(stdout);
        all = all && found.empty();
    }
    return all;
}

}  // namespace

int main(int count, char **arguments) {
    if (count != 2) return std::fprintf(stderr, "usage: quamba_cpu_check PATH/_quamba_cpu.so\n"), 2;
    if (!open_library(arguments[1]))
        return std::fprintf(stderr, "%s is not the library: %s\n", arguments[1], dlerror()), 2;
    if (!check_sizes()) return std::fprintf(stderr, "the library has other structs than this program\n"), 2;
    std::string left = library.instruction_sets();
    if (left.empty()) return std::fprintf(stderr, "the library has no kernels for this processor\n"), 1;
    bool all = true;
    while (!left.empty()) {
        const size_t comma = left.find(',');
        all = check_set(left.substr(0, comma)) && all;
        left = comma == std::string::npos ? "" : left.substr(comma + 1);
    }
    return all ? 0 : 1;
}
