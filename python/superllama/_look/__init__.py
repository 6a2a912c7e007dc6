"""What people see: amounts, bars, tables, fragments of pages."""
