"""The engine: the loop, the scheduler, the block manager and the model runner."""
