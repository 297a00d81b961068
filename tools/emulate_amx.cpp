// Runs AMX's instructions on x86-64 processors that have none: each raises SIGILL, whose handler does what it would do.
// Linked to kernel_cases.cpp by tools/check_cpu_levels.py, which also has the linker replace syscall and signal. Only what
// tiles.cpp uses is known: ldtilecfg, tilerelease, tilezero, tileloadd, tilestored, tdpbf16ps, tdpbsud. Anything else ends
// the program, and so does a tile before permission was asked for.
// Source: Intel, "Intel 64 and IA-32 Architectures Software Developer's Manual", volume 2 (their encodings and operations).

#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <bit>
#include <cstdint>
#include <cstring>

namespace {

struct Tile {
  int rows = 0, bytes = 0;
  uint8_t data[16][64] = {};
};

thread_local Tile tiles[8];
thread_local bool is_configured = false;
bool is_permitted = false;

[[noreturn]] void fail(const char* why) {
  (void)!write(2, why, std::strlen(why));
  _exit(3);
}

// Adds to a sum the product of 32 bits of each side: two bfloat16 numbers, or four bytes, of a signed, of b unsigned.
void add_product(float& sum, const uint8_t* a, const uint8_t* b) {
  uint16_t of_a[2], of_b[2];
  std::memcpy(of_a, a, 4), std::memcpy(of_b, b, 4);
  const auto number = [](uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); };
  for (int i = 0; i < 2; i++) sum += number(of_a[i]) * number(of_b[i]);
}

void add_product(int32_t& sum, const uint8_t* a, const uint8_t* b) {
  for (int i = 0; i < 4; i++) sum += static_cast<int8_t>(a[i]) * b[i];
}

void configure(const uint8_t* palette) {
  if (!is_permitted) fail("ldtilecfg: no permission\n");
  if (palette[0] != 1 || palette[1] != 0) fail("ldtilecfg: palette 1, from row 0\n");
  for (int i = 2; i < 16; i++)
    if (palette[i]) fail("ldtilecfg: reserved bytes must be 0\n");
  for (int t = 0; t < 16; t++) {
    uint16_t bytes;
    std::memcpy(&bytes, palette + 16 + 2 * t, 2);
    if (bytes > 64 || palette[48 + t] > 16 || (t >= 8 && (bytes || palette[48 + t]))) fail("ldtilecfg: sizes of tiles\n");
    if (t < 8) tiles[t] = Tile{palette[48 + t], bytes};
  }
  is_configured = true;
}

template <typename Sum>
void multiply(Tile& c, const Tile& a, const Tile& b) {
  if (c.rows != a.rows || c.bytes != b.bytes || a.bytes / 4 != b.rows) fail("a product of tiles that do not fit\n");
  for (int m = 0; m < c.rows; m++)
    for (int n = 0; n < c.bytes / 4; n++) {
      Sum sum;
      std::memcpy(&sum, c.data[m] + 4 * n, 4);
      for (int k = 0; k < a.bytes / 4; k++) add_product(sum, a.data[m] + 4 * k, b.data[k] + 4 * n);
      std::memcpy(c.data[m] + 4 * n, &sum, 4);
    }
}

// One instruction, as far as it has been decoded: VEX of three bytes, opcode, ModRM, then perhaps SIB and a displacement.
class Instruction {
 public:
  explicit Instruction(greg_t* registers) : registers_(registers), at_(reinterpret_cast<uint8_t*>(registers[REG_RIP])) {
    if (at_[0] != 0xc4 || (at_[1] & 31) != 2) fail("an illegal instruction that is none of AMX's\n");
    extend_reg_ = !(at_[1] & 0x80), extend_index_ = !(at_[1] & 0x40), extend_base_ = !(at_[1] & 0x20);
    vvvv_ = (~at_[2] >> 3) & 15, prefix_ = at_[2] & 3, opcode_ = at_[3], modrm_ = at_[4];
    length_ = 5;
  }

  void run() {
    const int reg = modrm_ >> 3 & 7, rm = modrm_ & 7;
    const bool is_memory = modrm_ >> 6 != 3;
    if (extend_reg_) fail("a ninth tile\n");
    if (opcode_ == 0x49 && prefix_ == 0 && is_memory) {
      configure(address());
    } else if (opcode_ == 0x49 && prefix_ == 0 && modrm_ == 0xc0) {
      is_configured = false;
    } else if (!is_configured) {
      fail("a tile instruction before ldtilecfg\n");
    } else if (opcode_ == 0x49 && prefix_ == 3 && !is_memory) {
      std::memset(tiles[reg].data, 0, sizeof tiles[reg].data);
    } else if (opcode_ == 0x4b && is_memory && prefix_ >= 2) {
      uint8_t* row = address();
      for (int m = 0; m < tiles[reg].rows; m++, row += stride_) {
        if (prefix_ == 3)
          std::memcpy(tiles[reg].data[m], row, tiles[reg].bytes);
        else
          std::memcpy(row, tiles[reg].data[m], tiles[reg].bytes);
      }
    } else if (opcode_ == 0x5c && prefix_ == 2 && !is_memory) {
      multiply<float>(tiles[reg], tiles[rm], tiles[vvvv_]);
    } else if (opcode_ == 0x5e && prefix_ == 2 && !is_memory) {
      multiply<int32_t>(tiles[reg], tiles[rm], tiles[vvvv_]);
    } else {
      fail("an instruction of AMX that is not known\n");
    }
    registers_[REG_RIP] += length_;
  }

 private:
  int64_t value(int number) const {
    static constexpr int kNames[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                     REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return registers_[kNames[number]];
  }

  // The address in memory; sets stride_ to the index register's value times its scale, and length_.
  uint8_t* address() {
    const int mode = modrm_ >> 6;
    int base = modrm_ & 7;
    if (base == 4) {
      const uint8_t sib = at_[length_++];
      const int index = (sib >> 3 & 7) + 8 * extend_index_;
      stride_ = index == 4 ? 0 : value(index) << (sib >> 6);
      base = sib & 7;
    }
    if (mode == 0 && base == 5) fail("an address without a base\n");
    int32_t displacement = 0;
    if (mode == 1) displacement = static_cast<int8_t>(at_[length_++]);
    if (mode == 2) std::memcpy(&displacement, at_ + length_, 4), length_ += 4;
    const int64_t start = value(base + 8 * extend_base_) + displacement;
    return reinterpret_cast<uint8_t*>(opcode_ == 0x49 ? start + stride_ : start);  // of tiles, the index is the stride
  }

  greg_t* registers_;
  const uint8_t* at_;
  bool extend_reg_, extend_index_, extend_base_;
  int vvvv_, prefix_, opcode_, modrm_, length_;
  int64_t stride_ = 0;
};

void handle(int, siginfo_t*, void* context) {
  Instruction(static_cast<ucontext_t*>(context)->uc_mcontext.gregs).run();
}

__attribute__((constructor)) void install() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace

extern "C" long __real_syscall(long, ...);

extern "C" long __wrap_syscall(long number, long a, long b, long c, long d, long e, long f) {
  if (number == SYS_arch_prctl && a == 0x1023 && b == 18) return is_permitted = true, 0;
  return __real_syscall(number, a, b, c, d, e, f);
}

// SIGILL keeps its handler.
extern "C" sighandler_t __wrap_signal(int, sighandler_t) { return SIG_DFL; }
