@echo off
rem Opens a page in the browser to train from, with the first Python on this computer that runs this suite.
setlocal
cd /d "%~dp0"
for %%v in (3.12 3.13 3.11 3.14 3.10) do (
  py -%%v -c "" >nul 2>nul && (
    py -%%v tools\start.py page %*
    goto end
  )
)
python -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))" >nul 2>nul && (
  python tools\start.py page %*
  goto end
)
echo This suite needs Python 3.10 to 3.14. Install one from the page that opens, and start again.
start "" https://www.python.org/downloads/
pause
exit /b 1
:end
if errorlevel 1 pause
exit /b %errorlevel%
