-- Bytes read over the whole run as multiples of the model: by the block trace, our reader's trace, the process's counter.
SELECT model_name, engine, scenario, swappiness, read_ahead_kb,
       median(block_bytes / model_bytes) AS factor_block,
       median(reader_bytes / model_bytes) AS factor_reader,
       median(total_read_bytes / model_bytes) AS factor_process
FROM runs
LEFT JOIN (SELECT run, sum(bytes) AS reader_bytes FROM reader GROUP BY run) USING (run)
GROUP BY ALL
ORDER BY ALL;
