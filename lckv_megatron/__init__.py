"""The programs: `lckv-megatron NAME`, one module of `lckv_megatron.commands` each, and what they share."""
