// What a program says last.
#pragma once

namespace superllama {

// From now on an exception that leaves the program's main function is printed as its reason to fail. To be called by
// the main thread, once or more.
void tell_reasons();

} // namespace superllama
