"""`mdm refresh`, measured against img2dataset at the same work, and at what img2dataset does not do."""
