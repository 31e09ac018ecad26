"""What a run reports while it trains: events, throughput, gauges, progress and profiles."""
