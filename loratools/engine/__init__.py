"""Plans, the memory model, the executor, reports. The executor evaluates a plan's rules and decides nothing."""
