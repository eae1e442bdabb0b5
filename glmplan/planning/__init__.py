"""What fits and in which layout. Pure: the same facts and request give the same plan."""
