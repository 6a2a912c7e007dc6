-- Share of each layer that the page cache held, over time: the first repeat of each configuration.
SELECT r.model_name, r.engine, r.scenario, r.swappiness, r.read_ahead_kb, r.run, t_us / 1e6 AS t_s, layer,
       cached_bytes / nullif(bytes, 0) AS cached_share
FROM residency JOIN runs r USING (run)
WHERE r.repeat = 0
ORDER BY ALL;
