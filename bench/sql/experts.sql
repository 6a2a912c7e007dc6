-- How often each expert of each layer was read: bytes as multiples of its size.
WITH sizes AS (SELECT model_name, layer, expert, sum(bytes) AS expert_bytes FROM ranges WHERE expert >= 0 GROUP BY ALL),
read AS (
    SELECT run, layer, expert, 'block' AS source, sum(bytes) AS bytes FROM block_pieces WHERE expert >= 0 GROUP BY ALL
    UNION ALL
    SELECT run, layer, expert, 'reader', sum(bytes) FROM reader_pieces WHERE expert >= 0 GROUP BY ALL
)
SELECT r.model_name, r.engine, r.scenario, r.swappiness, r.read_ahead_kb, source, s.layer, s.expert,
       avg(read.bytes / expert_bytes) AS times_read
FROM read JOIN runs r USING (run) JOIN sizes s USING (model_name, layer, expert)
GROUP BY ALL
ORDER BY ALL;
