"""The engine from Python: llama-server's slots in this process, behind LLM and AsyncLLM.

What a request says is JSON of the server's API, made and read in `text`, `conversation` and `vectors`; `handle` sends
it and waits; `options` are the engine's own, `fields` those of a request. `server` is a process beside this one, and
`starting` what it takes to have one.
"""
