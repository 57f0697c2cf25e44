"""DVC: the pipeline files, what is current, and the objects in its stores."""
