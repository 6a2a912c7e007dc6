-- Speed and bytes per token of each configuration, over its repeats.
SELECT model_name, engine, scenario, swappiness, read_ahead_kb,
       any_value(budget_bytes) AS budget_bytes,
       any_value(model_bytes) AS model_bytes,
       count(*) AS n,
       count(*) FILTER (status = 'ok') AS n_ok,
       count(*) FILTER (status = 'oom') AS n_oom,
       median(decode_tokens_per_s) AS tokens_per_s,
       min(decode_tokens_per_s) AS tokens_per_s_min,
       max(decode_tokens_per_s) AS tokens_per_s_max,
       median(prompt_tokens_per_s) AS prompt_tokens_per_s,
       median(first_token_s) AS first_token_s,
       median(decode_read_bytes / tokens) AS bytes_per_token,
       max(peak_bytes) AS peak_bytes
FROM runs
GROUP BY ALL
ORDER BY model_name, budget_bytes DESC NULLS FIRST, swappiness, read_ahead_kb, engine;
