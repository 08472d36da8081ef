// The plain kernels of chains.py, operation by operation (so compile without fused multiply-adds): a tile of chains stays
// in the first cache through all the outer steps. theta and out are (rows, n), draws is (steps, n), a Cell per row.
#include <cmath>
#include <cstdint>

struct Cell {
    double alpha, A, a[2], centre[2], q, weight;
};
constexpr int64_t tile = 256;

// How far u is into the cubic piece, in [0, 1].
static inline double bent(double u, double A) {
    const double x = std::fabs(u) - A, above = x > 0 ? x : 0;
    return above < 1 ? above : 1;
}

static inline double slope(double u, double t, double A) {
    const double z = std::fabs(u);
    return std::copysign((z < A ? z : A) + t - t * t / 2, u);
}

// u = theta - centre comes in; G_FO and G / G_FO go out, in u and in contraction.
static inline void gradients(double *u, double *contraction, const double *a, const Cell &cell, int64_t r, int64_t n) {
    const double A = cell.A;
    double rate[tile];
    for (int64_t i = 0; i < n; ++i) contraction[i] = 1, rate[i] = cell.alpha * a[i];
    for (int64_t j = 0; j < r; ++j)
        for (int64_t i = 0; i < n; ++i) {
            const double t = bent(u[i], A);
            contraction[i] *= 1 - rate[i] * (1 - t);
            u[i] -= rate[i] * slope(u[i], t, A);
        }
    for (int64_t i = 0; i < n; ++i) u[i] = a[i] * slope(u[i], bent(u[i], A), A);
}

extern "C" void advance(double *theta, const double *draws, const double *gammas, const Cell *cells, int64_t r,
                        int64_t steps, int64_t rows, int64_t n) {
    double u[tile], contraction[tile], a[tile];
    for (int64_t row = 0; row < rows; ++row, theta += n) {
        const Cell cell = cells[row];
        for (int64_t first = 0; first < n; first += tile) {
            const int64_t size = n - first < tile ? n - first : tile;
            for (int64_t k = 0; k < steps; ++k) {
                const double *draw = draws + k * n + first, gamma = gammas[k];
                double *x = theta + first;
                for (int64_t i = 0; i < size; ++i) {
                    const bool second = draw[i] >= 0.5;
                    a[i] = second ? cell.a[1] : cell.a[0];
                    u[i] = x[i] - (second ? cell.centre[1] : cell.centre[0]);
                }
                gradients(u, contraction, a, cell, r, size);
                for (int64_t i = 0; i < size; ++i) {
                    const double coin = draw[i] >= 0.5 ? 2 * draw[i] - 1 : 2 * draw[i];
                    x[i] -= gamma * u[i] * (1 + (coin < cell.q ? cell.weight : 0) * (contraction[i] - 1));
                }
            }
        }
    }
}

extern "C" void gradient_sq(double *out, const double *theta, const Cell *cells, int64_t r, int64_t rows, int64_t n) {
    double u[tile], contraction[tile], a[tile], sum[tile];
    for (int64_t row = 0; row < rows; ++row, theta += n, out += n)
        for (int64_t first = 0; first < n; first += tile) {
            const int64_t size = n - first < tile ? n - first : tile;
            for (int task = 0; task < 2; ++task) {
                for (int64_t i = 0; i < size; ++i) {
                    a[i] = cells[row].a[task];
                    u[i] = theta[first + i] - cells[row].centre[task];
                }
                gradients(u, contraction, a, cells[row], r, size);
                for (int64_t i = 0; i < size; ++i) sum[i] = (task ? sum[i] : 0) + u[i] * contraction[i];
            }
            for (int64_t i = 0; i < size; ++i) out[first + i] = sum[i] / 2 * (sum[i] / 2);
        }
}
