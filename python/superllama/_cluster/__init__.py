"""A model over several machines: a group is an engine, and RPC servers that lend it their memory.

bundles     what each bundle has, and what budgets and flags follow from it
tied        processes that end with the one that started them
part        the RPC server of a bundle
relay       the address at which an engine finds a part, wherever that is now
exchange    a request to the engine, and its answer, piece by piece
engine      superllama-server of a group, and what can be asked of it
group       both of them over time: parts that go away, and come back
sessions    which replica a conversation belongs to
router      the same, for Ray Serve
deployment  all of it as an application of Ray Serve; it and the router import Ray
command     `superllama cluster`
"""
