"""How fast networks are here, against timm's own and against what the machine can do."""
from timm_miil.bench.against import Change, compare_tables
from timm_miil.bench.cases import CASE_COLUMNS, LAYOUTS, MODES, PHASES, PRECISIONS, VARIANTS, Case, plan_groups
from timm_miil.bench.contestants import Optimize, UnsupportedCase, build_model, build_run, is_out_of_memory
from timm_miil.bench.environment import environment, place
from timm_miil.bench.journal import Journal, read_table, write_table
from timm_miil.bench.measuring import (
    COLUMNS, BenchResult, find_largest_batch, measure_group, measure_groups, search_batch)
from timm_miil.bench.operators import profile_case
from timm_miil.bench.roofline import Ceilings, Cost, count_cost, measure_ceilings, roofline_seconds
from timm_miil.bench.timing import (
    Clock, Run, clock_of, clocks_of, compare, device_events, device_work, itself, processor, quartiles, wall)

__all__ = [
    'BenchResult', 'CASE_COLUMNS', 'COLUMNS', 'Case', 'Ceilings', 'Change', 'Clock', 'Cost', 'Journal', 'LAYOUTS',
    'MODES', 'Optimize', 'PHASES', 'PRECISIONS', 'Run', 'UnsupportedCase', 'VARIANTS', 'build_model', 'build_run',
    'clock_of', 'clocks_of', 'compare', 'compare_tables', 'count_cost', 'device_events', 'device_work', 'environment',
    'find_largest_batch', 'is_out_of_memory', 'itself', 'measure_ceilings', 'measure_group',
    'measure_groups', 'place', 'plan_groups', 'processor', 'profile_case', 'quartiles', 'read_table',
    'roofline_seconds', 'search_batch', 'wall', 'write_table',
]
