"""What every command stands on: settings, files, a run's folder, many processes as one."""
