"""What a run needs of a device's memory, by part and by phase, and the micro-batches that fit into what is free.

Parts that stay are counted from shapes. What a phase needs beside them is traced: its operators run on fake tensors, which
have shapes and no values, and a dispatch mode adds up the storages that are alive. The work space of operators, fragmentation
and the rewards' own models are in none of this.
"""
