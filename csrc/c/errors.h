// What the library throws and biper.h returns.
#pragma once

#include <stdexcept>
#include <string>

#include "biper.h"

namespace biper {

class Error : public std::runtime_error {
 public:
  Error(biper_status status, const std::string& message)
      : std::runtime_error(message), status_(status) {}

  biper_status status() const { return status_; }

 private:
  biper_status status_;
};

[[noreturn]] inline void refuse_file(const std::string& message) {
  throw Error(BIPER_ERROR_FORMAT, message);
}

}  // namespace biper
