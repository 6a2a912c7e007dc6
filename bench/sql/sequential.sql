-- One line per configuration: the sequential and the backward share before and after extents are taken into account.
WITH steps AS (
    SELECT run, "offset", bytes,
           disk_offset - lag(disk_offset + disk_bytes) OVER in_order AS physical_gap,
           "offset" - lag("offset" + bytes) OVER in_order AS logical_gap
    FROM block
    WINDOW in_order AS (PARTITION BY run ORDER BY t_us, row_number)
)
SELECT model_name, moe, engine, scenario, swappiness, read_ahead_kb,
       count(*) AS requests,
       median(bytes) AS request_bytes,
       avg((physical_gap = 0)::INT) AS physical_sequential,
       avg((physical_gap < 0)::INT) AS physical_backward,
       avg((logical_gap = 0)::INT) AS logical_sequential,
       avg((logical_gap < 0)::INT) AS logical_backward,
       avg((logical_gap BETWEEN 0 AND 1024 * 1024)::INT) AS logical_near,
       sum(bytes) FILTER (logical_gap = 0) / sum(bytes) AS logical_sequential_bytes
FROM steps JOIN runs USING (run)
WHERE logical_gap IS NOT NULL
GROUP BY ALL
ORDER BY ALL;
