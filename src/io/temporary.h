// Files that a process makes for itself while it runs: on a disk where there is one, for nobody else, gone at its end.
#pragma once

#include "io/file.h"

#include <string>

namespace superllama {

// A file without a name, in `folder`; "" is the system's temporary folder, or another one where that is memory. The
// folder that it lies in goes to `folder`. Throws std::runtime_error that says `what` could not be made.
descriptor unnamed_file(std::string & folder, const char * what);

// A folder in `folder`, as above, that goes with its files.
class temporary_folder {
  public:
    temporary_folder(const std::string & folder, const char * what);
    ~temporary_folder();
    temporary_folder(const temporary_folder &) = delete;
    temporary_folder & operator=(const temporary_folder &) = delete;

    std::string file(const std::string & name) const { return path + "/" + name; }

  private:
    std::string path;
};

} // namespace superllama
