-- Do independent counters agree? Bytes by the block trace, by the kernel's account of the process, by the disk.
SELECT run, model_name, engine, scenario, block_bytes, total_read_bytes AS process_bytes,
       total_disk_read_bytes AS disk_bytes,
       block_bytes / total_read_bytes AS block_to_process,
       block_bytes / total_disk_read_bytes AS block_to_disk,
       trace_lost
FROM runs
WHERE status = 'ok' AND block_bytes IS NOT NULL
ORDER BY run;
