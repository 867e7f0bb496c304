"""What every room may use: errors, progress, locks, the cache folder, and facts about the machine."""
