"""Is a backward rule right? The checker, its oracles and its report."""
