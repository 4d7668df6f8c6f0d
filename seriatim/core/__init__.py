"""What every other package stands on: errors, files, randomness, schedules, progress."""
