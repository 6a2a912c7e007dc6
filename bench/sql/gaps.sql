-- How far each request starts from the end of the one before: on the disk, and in the file once extents are known.
WITH steps AS (
    SELECT run,
           disk_offset - lag(disk_offset + disk_bytes) OVER in_order AS physical_gap,
           "offset" - lag("offset" + bytes) OVER in_order AS logical_gap
    FROM block
    WINDOW in_order AS (PARTITION BY run ORDER BY t_us, row_number)
), kinds AS (
    SELECT run, 'physical' AS space, gap_kind(physical_gap) AS kind FROM steps WHERE physical_gap IS NOT NULL
    UNION ALL
    SELECT run, 'logical', gap_kind(logical_gap) FROM steps WHERE logical_gap IS NOT NULL
), counts AS (
    SELECT model_name, engine, scenario, swappiness, read_ahead_kb, space, kind, count(*) AS requests
    FROM kinds JOIN runs USING (run)
    GROUP BY ALL
)
SELECT *, requests / sum(requests) OVER (PARTITION BY model_name, engine, scenario, swappiness, read_ahead_kb, space) AS share
FROM counts
ORDER BY ALL;
