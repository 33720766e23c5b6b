// The processor's matrix tiles (AMX), or an emulation of them in plain C++ (XSMOE_EMULATE_AMX=1 at build time). Tests
// use the emulation on machines without AMX. It checks the rules of the processor.
#pragma once

#include <cstdint>
#include <cstring>

namespace xsmoe::XSMOE_ISA {
namespace {

// The operand of LDTILECFG: palette 1, and the number of rows and of bytes per row of tiles 0 to 7.
struct alignas(64) TileShapes {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64, "the processor reads 64 bytes");

}  // namespace
}  // namespace xsmoe::XSMOE_ISA

#ifdef XSMOE_EMULATE_AMX

#include <cstdio>
#include <cstdlib>

namespace xsmoe::XSMOE_ISA {
namespace {

// Abort the program with a message where the processor would raise a fault.
struct EmulatedTiles {
    bool configured = false;
    TileShapes shapes;
    alignas(64) uint8_t bytes[8][16][64];

    void configure(const void* from) {
        std::memcpy(&shapes, from, sizeof(shapes));
        require(shapes.palette == 1 && shapes.start_row == 0, "the palette must be 1 and the first row 0");
        for (uint8_t byte : shapes.reserved) require(byte == 0, "reserved bytes of a configuration must be 0");
        for (int tile = 0; tile < 16; ++tile) {
            const int rows = shapes.rows[tile], row_bytes = shapes.row_bytes[tile];
            require(rows <= 16 && row_bytes <= 64, "a tile has at most 16 rows of 64 bytes");
            require((rows == 0) == (row_bytes == 0), "a tile has either both rows and bytes or neither");
            require(tile < 8 || rows == 0, "there are 8 tiles");
        }
        configured = true;
        std::memset(bytes, 0, sizeof(bytes));
    }

    void release() { configured = false; }

    void zero(int tile) {
        require_valid(tile);
        std::memset(bytes[tile], 0, sizeof(bytes[tile]));
    }

    void load(int tile, const void* from, int64_t stride) {
        zero(tile);
        for (int row = 0; row < shapes.rows[tile]; ++row) {
            std::memcpy(bytes[tile][row], static_cast<const char*>(from) + row * stride, shapes.row_bytes[tile]);
        }
    }

    void store(int tile, void* to, int64_t stride) const {
        require_valid(tile);
        for (int row = 0; row < shapes.rows[tile]; ++row) {
            std::memcpy(static_cast<char*>(to) + row * stride, bytes[tile][row], shapes.row_bytes[tile]);
        }
    }

    // c[m][n] += sum over k of a[m][2k] b[k][2n] + a[m][2k+1] b[k][2n+1], in bfloat16, accumulated in float32. Even and
    // odd terms are summed separately first, as the processor does.
    void multiply(int c, int a, int b) {
        require_words(c);
        require_words(a);
        require_words(b);
        require(c != a && c != b && a != b, "a product needs three different tiles");
        require(shapes.rows[c] == shapes.rows[a], "sums must have the rows of the left operand");
        require(
            shapes.rows[b] == shapes.row_bytes[a] / 4, "the right operand must have a row for each word of the left one"
        );
        require(shapes.row_bytes[c] == shapes.row_bytes[b], "sums must have the columns of the right operand");
        for (int m = 0; m < shapes.rows[c]; ++m) {
            float even[16] = {}, odd[16] = {}, sums[16];
            for (int k = 0; k < shapes.rows[b]; ++k) {
                uint32_t left, right[16];
                std::memcpy(&left, &bytes[a][m][4 * k], sizeof(left));
                std::memcpy(right, bytes[b][k], sizeof(right));
                for (int n = 0; n < 16; ++n) {
                    even[n] += number(left << 16) * number(right[n] << 16);
                    odd[n] += number(left & 0xffff0000) * number(right[n] & 0xffff0000);
                }
            }
            std::memcpy(sums, bytes[c][m], sizeof(sums));
            for (int n = 0; n < 16; ++n) sums[n] += even[n] + odd[n];
            std::memcpy(bytes[c][m], sums, shapes.row_bytes[c]);
        }
    }

private:
    static float number(uint32_t bits) {
        float value;
        std::memcpy(&value, &bits, sizeof(value));
        return value;
    }

    static void require(bool holds, const char* rule) {
        if (holds) return;
        std::fprintf(stderr, "xsmoe: a processor with matrix tiles would raise a fault here: %s\n", rule);
        std::abort();
    }

    void require_valid(int tile) const {
        require(configured, "tiles must be configured before they are used, by the thread that uses them");
        require(0 <= tile && tile < 8 && shapes.rows[tile] > 0, "a tile without rows cannot be used");
    }

    void require_words(int tile) const {
        require_valid(tile);
        require(shapes.row_bytes[tile] % 4 == 0, "rows of operands and sums must be whole words");
    }
};

EmulatedTiles& emulated_tiles() {
    static thread_local EmulatedTiles tiles;
    return tiles;
}

}  // namespace
}  // namespace xsmoe::XSMOE_ISA

#define XSMOE_TILE_CONFIGURE(shapes) emulated_tiles().configure(shapes)
#define XSMOE_TILE_RELEASE() emulated_tiles().release()
#define XSMOE_TILE_ZERO(tile) emulated_tiles().zero(tile)
#define XSMOE_TILE_LOAD(tile, from, stride) emulated_tiles().load(tile, from, stride)
#define XSMOE_TILE_STORE(tile, to, stride) emulated_tiles().store(tile, to, stride)
#define XSMOE_TILE_MULTIPLY(c, a, b) emulated_tiles().multiply(c, a, b)

#else

#include <immintrin.h>

#define XSMOE_TILE_CONFIGURE(shapes) _tile_loadconfig(shapes)
#define XSMOE_TILE_RELEASE() _tile_release()
#define XSMOE_TILE_ZERO(tile) _tile_zero(tile)
#define XSMOE_TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define XSMOE_TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define XSMOE_TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)

#endif
