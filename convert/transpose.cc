// Transposes in square tiles that fit in registers; see transpose.py.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

// Sizes of a tile, and of the rows of tiles that fill a cache line of the result.
constexpr int64_t kTile = 8;
constexpr int64_t kLineBytes = 64;

template <class T>
void Transpose(const T* from, int64_t rows, int64_t columns, int64_t from_stride, T* to,
               int64_t to_stride) {
  constexpr int64_t kRows = kLineBytes / sizeof(T);
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t end = std::min(first + kRows, rows);
    for (int64_t column = 0; column < columns; column += kTile) {
      const int64_t last = std::min(column + kTile, columns);
      if (end - first < kRows || last - column < kTile) {
        for (int64_t r = first; r < end; ++r) {
          for (int64_t c = column; c < last; ++c) to[c * to_stride + r] = from[r * from_stride + c];
        }
        continue;
      }
      for (int64_t r = first; r < end; r += kTile) {
        T tile[kTile][kTile], transposed[kTile][kTile];
        for (int64_t i = 0; i < kTile; ++i) {
          std::memcpy(tile[i], from + (r + i) * from_stride + column, sizeof(tile[i]));
        }
        for (int64_t j = 0; j < kTile; ++j) {
          for (int64_t i = 0; i < kTile; ++i) transposed[j][i] = tile[i][j];
        }
        for (int64_t j = 0; j < kTile; ++j) {
          std::memcpy(to + (column + j) * to_stride + r, transposed[j], sizeof(transposed[j]));
        }
      }
    }
  }
}

}  // namespace

extern "C" {

void Transpose1(const uint8_t* from, int64_t rows, int64_t columns, int64_t from_stride,
                uint8_t* to, int64_t to_stride) {
  Transpose(from, rows, columns, from_stride, to, to_stride);
}

void Transpose2(const uint16_t* from, int64_t rows, int64_t columns, int64_t from_stride,
                uint16_t* to, int64_t to_stride) {
  Transpose(from, rows, columns, from_stride, to, to_stride);
}

void Transpose4(const uint32_t* from, int64_t rows, int64_t columns, int64_t from_stride,
                uint32_t* to, int64_t to_stride) {
  Transpose(from, rows, columns, from_stride, to, to_stride);
}
}
