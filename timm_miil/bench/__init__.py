"""How fast networks are here, against timm's own and against what the machine can do."""
from timm_miil.bench.environment import environment, place
from timm_miil.bench.timing import (
    Clock, Run, clock_of, clocks_of, compare, device_events, device_work, itself, processor, quartiles, wall)

__all__ = [
    'Clock', 'Run', 'clock_of', 'clocks_of', 'compare', 'device_events', 'device_work', 'environment', 'itself',
    'place', 'processor', 'quartiles', 'wall',
]
