"""hmad's kernels: one file each = the kernel, its checked launcher, its reference twin. Never imports hmad."""
