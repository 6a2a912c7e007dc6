-- How often each layer was read: requests that touched it, and bytes read as multiples of its size. Layer -1 = outside.
WITH sizes AS (SELECT model_name, layer, sum(bytes) AS layer_bytes FROM ranges GROUP BY ALL),
read AS (
    SELECT run, layer, 'block' AS source, count(*) AS requests, sum(bytes) AS bytes FROM block_pieces GROUP BY ALL
    UNION ALL
    SELECT run, layer, 'reader', count(*), sum(bytes) FROM reader_pieces GROUP BY ALL
)
SELECT r.model_name, r.engine, r.scenario, r.swappiness, r.read_ahead_kb, source, read.layer,
       avg(requests) AS requests, avg(read.bytes) AS bytes, avg(read.bytes / layer_bytes) AS times_read
FROM read JOIN runs r USING (run) JOIN sizes s ON s.model_name = r.model_name AND s.layer = read.layer
GROUP BY ALL
ORDER BY ALL;
