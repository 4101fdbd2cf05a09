"""One small class a stage: how it makes its batches, its loss and its evaluation. The loop knows only `task.Task`."""
