"""The base that every other package uses: errors, files, randomness, schedules, progress."""
