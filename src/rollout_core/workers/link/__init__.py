"""Between a worker and its engine, which runs in a process of its own or in a thread of this one."""
