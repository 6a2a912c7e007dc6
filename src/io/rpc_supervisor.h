// The RPC server's program serves in a process that may end without ending the server.
#pragma once

namespace superllama {

// Returns in a child process that serves. Where that dies of a signal (a kernel that aborts on a graph which makes no
// sense, a device's driver), its connection is lost and another child serves the next one. Ends with the child where
// it ends by itself or was told to. Called before a backend is loaded: no device survives a fork. Our flags leave argv
// for the program's parser, which does not know them; one that is wrong ends the process.
void rpc_supervise(int & argc, char ** argv);

} // namespace superllama
