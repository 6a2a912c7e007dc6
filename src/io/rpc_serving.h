// A client of an RPC server, from its first word to its last: what it sends may end its connection, nothing else.
#pragma once

#include <functional>

namespace superllama {

// Serves a client by `serve`. What throws there, no memory and upstream's failed assertions included, ends the
// connection with a line in the log. A failed assertion in a kernel still ends the process, which rpc_supervise()
// replaces: kernels run in several threads, which no exception may leave.
void rpc_serve(const std::function<void()> & serve);

} // namespace superllama
