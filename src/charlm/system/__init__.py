"""What every room may use: errors, progress, locks, the cache folder, facts about the machine."""
