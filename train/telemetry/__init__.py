"""Reports of a run while it trains: events, throughput, gauges, progress and profiles."""
