"""`mdm benchmark resume`: a worker of a training is killed, and what that costs is measured."""
