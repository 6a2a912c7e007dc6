-- Where the time went: CPU used (of all cores), and the share of time in which all waited for memory or for I/O (PSI).
SELECT model_name, engine, scenario, swappiness, read_ahead_kb,
       median((total_cpu_user_s + total_cpu_system_s) / wall_s / threads) AS cpu_share,
       median(total_cpu_system_s / nullif(total_cpu_user_s + total_cpu_system_s, 0)) AS kernel_share_of_cpu,
       median(total_psi_memory_full_us / 1e6 / wall_s) AS memory_stall_share,
       median(total_psi_io_full_us / 1e6 / wall_s) AS io_stall_share,
       median(total_major_faults) AS major_faults,
       median(total_group_refaults) AS refaults
FROM runs
WHERE status = 'ok'
GROUP BY ALL
ORDER BY ALL;
