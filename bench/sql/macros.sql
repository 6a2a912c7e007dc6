-- Shared by the other files. Tables: runs, block, block_pieces, reader, counters, residency, ranges (analysis.py).
-- The categories of the original study; a gap is from the end of the request before to the start of this one.
CREATE OR REPLACE MACRO gap_kind(gap) AS
    CASE WHEN gap = 0 THEN '0'
         WHEN gap < 0 THEN 'backward'
         WHEN gap < 128 * 1024 THEN '< 128 KB'
         WHEN gap < 1024 * 1024 THEN '< 1 MB'
         ELSE '>= 1 MB' END;
