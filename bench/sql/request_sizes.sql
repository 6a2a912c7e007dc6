-- Sizes of the requests to the disk, bytes.
SELECT model_name, engine, scenario, swappiness, read_ahead_kb,
       count(*) AS requests,
       quantile_cont(disk_bytes, 0.1) AS p10,
       median(disk_bytes) AS p50,
       quantile_cont(disk_bytes, 0.9) AS p90,
       max(disk_bytes) AS largest
FROM block JOIN runs USING (run)
GROUP BY ALL
ORDER BY ALL;
