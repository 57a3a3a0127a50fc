"""Which weights of a model, what part of them, and how they are read and written: the only room that changes one."""
