// SHA-256 (FIPS 180-4), for the hashes of a manifest and of frames.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace greedy::core {

class Sha256 {
  public:
    void add(const unsigned char* data, std::size_t size);
    std::string hex() const;  // of the bytes added so far, 64 digits

  private:
    std::array<std::uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                           0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::array<unsigned char, 64> rest_{};  // the last bytes, less than a block
    std::uint64_t size_ = 0;
};

}  // namespace greedy::core
