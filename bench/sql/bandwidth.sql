-- Per run: the busiest 100 ms, by when requests were submitted and by when they completed. Only completions are bandwidth.
WITH issued AS (
    SELECT run, t_us // 100000 AS slot, sum(disk_bytes) AS bytes FROM block GROUP BY ALL
), completed AS (
    SELECT run, done_us // 100000 AS slot, sum(disk_bytes) AS bytes FROM block WHERE done_us IS NOT NULL GROUP BY ALL
)
SELECT model_name, engine, scenario, swappiness, read_ahead_kb,
       max(10 * i.peak) AS submitted_peak_per_s,
       max(10 * c.peak) AS completed_peak_per_s,
       median(block_bytes / wall_s) AS mean_per_s,
       median(block_requeued_bytes / block_bytes) AS requeued_share
FROM runs
JOIN (SELECT run, max(bytes) AS peak FROM issued GROUP BY run) i USING (run)
JOIN (SELECT run, max(bytes) AS peak FROM completed GROUP BY run) c USING (run)
GROUP BY ALL
ORDER BY ALL;
