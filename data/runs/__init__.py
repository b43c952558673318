"""What a run is: settings, plan, compiled programs, folder, checkpoints, evaluation, report."""
