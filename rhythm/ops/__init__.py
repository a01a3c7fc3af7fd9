"""Q, K → statistics: the ops, their reference, their backends, and attention of other libraries. Needs torch alone."""
