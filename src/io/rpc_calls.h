// All that patched call sites in ggml-rpc.cpp and transport.cpp name.
#pragma once

#include "io/rpc_messages.h"
#include "io/rpc_link.h"
#include "io/rpc_meeting.h"
#include "io/rpc_serving.h"
#include "io/rpc_weights.h"
